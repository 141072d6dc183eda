"""The command that counts pairs of codes."""

from pathlib import Path

import pytest
import torch

from sjd2_lightning.cli.pairs import count_pairs, main
from sjd2_lightning.decoding.variants.pairs import PairTable
from tests.tools.shards import WriteCodes


def test_pairs_are_counted_inside_rows(write_codes: WriteCodes, tmp_path: Path, capsys) -> None:
    """Image i has the rows i, i + 1, i + 2 and i + 3, i + 4, i + 5."""
    shards = write_codes(20).folder
    wanted = torch.zeros(512, 512, dtype=torch.float64)
    for image in range(20):
        for left in (0, 1, 3, 4):
            wanted[image + left, image + left + 1] += 1
    assert torch.equal(count_pairs(shards), wanted)
    out = tmp_path / "made" / "pairs.safetensors"
    main([str(shards), str(out), "--rank", "30"])
    assert torch.equal(PairTable.load(out, 512).left, PairTable.of_counts(wanted, 30).left.half().float())
    assert f"decoding.pairs.table={out}" in capsys.readouterr().out


def test_other_folders_are_refused(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path), str(tmp_path / "pairs.safetensors")])
    assert stop.value.code == 1
    assert str(tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "pairs.safetensors").exists()
