"""Laws over large codebooks: the command writes its figures; nothing is sorted where nothing asks for it."""

import json

import pytest
import torch

from benchmarks import vocabulary
from sjd2_lightning.decoding import Sampling


def test_the_command_writes_its_figures(tmp_path):
    path = tmp_path / "found.json"
    vocabulary.main(["--codes", "64000", "--windows", "2", "4", "--repeats", "1", "--json", str(path)])
    found = json.loads(path.read_text())
    assert [(entry["mode"], entry["window"]) for entry in found] == [
        (mode, window) for mode in ("replay", "exact") for window in (2, 4)
    ]
    for entry in found:
        assert entry["seconds"] > 0
        assert entry["peak_over_law"] < 12, "what a batch is refused by, see `drawing`"
        assert entry["moved_bytes"] > entry["peak_bytes"]
        assert entry["gpu_share_by_bytes"].keys() == {"SimpleAR 0.5B", "SimpleAR 1.5B"}


@pytest.mark.parametrize("mode", vocabulary.MODES)
@torch.inference_mode()
def test_only_what_asks_for_it_is_selected_or_sorted(mode):
    wanted = {
        Sampling(): set(),
        Sampling(top_k=50): {"kthvalue"},  # selection, no order
        Sampling(top_p=0.9): {"sort"},
    }
    for sampling, names in wanted.items():
        call = vocabulary.own_work(64, 4, mode, Sampling(**{**vars(sampling), "guidance_scale": 3.0}))
        with vocabulary.Traffic() as traffic:
            call()
        assert set(traffic.names) & set(vocabulary.SORTING) == names
