"""One small evaluation and its provenance, for all tests of reports."""

import pytest

from sjd2_lightning.run.provenance import collect_provenance
from tests.tools.small_evaluation import PROMPTS, evaluate, small_backbone


@pytest.fixture(scope="session")
def result(tmp_path_factory):
    return evaluate(tmp_path_factory.mktemp("small_evaluation"))


@pytest.fixture(scope="session")
def provenance():
    seeds = {item.key: item.seed for item in PROMPTS}
    return collect_provenance(small_backbone(), {"window": 6, "api_key": "abc"}, seeds)
