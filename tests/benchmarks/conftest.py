"""What several benchmarks are tried on."""

from pathlib import Path

import pytest
import torch

from sjd2_lightning.models.small import build_tiny, small_vq


@pytest.fixture
def random_scenes_model(tmp_path) -> Path:
    """Folder of a model of scenes with random weights, 16 x 16 codes, beside its image tokenizer."""
    torch.manual_seed(0)
    small_vq(16, 3).save(tmp_path / "tokenizer")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_layers": 1, "num_heads": 2}
    build_tiny(["a dog", "two keys"], tmp_path / "tokenizer", 320, **sizes).save(tmp_path / "model")
    return tmp_path / "model"
