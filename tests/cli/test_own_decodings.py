"""What commands refuse that learn from a model's own decodings, before they load anything."""

import pytest

from sjd2_lightning.cli import correct, draft


@pytest.mark.parametrize("command", [correct.main, draft.main])
@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--temperature", "0"], "--temperature=0: greedy decoding draws nothing that could be learnt"),
        (["--num-images", "1"], "--num-images=1: must be at least 2"),
        (["--guidance-scale", "1", "2"], "--guidance-scale: 1 is decoding without guidance"),
        (["--guidance-scale", "2", "3", "--num-images", "3"], "must be at least 4"),
        (["--guidance-scale", "2", "nan"], "guidance_scale=nan"),
        (["--steps", "0"], "steps=0: must be at least 1"),
        ([], "no-shards"),
    ],
)
def test_bad_arguments_are_named_and_nothing_is_written(tmp_path, capsys, command, arguments, problem):
    shards, out = tmp_path / "no-shards", tmp_path / "out.safetensors"
    with pytest.raises(SystemExit) as left:
        command([str(shards), str(out), "--weights", "weights/tiny", *arguments])
    assert left.value.code == 1
    said = capsys.readouterr().err
    assert problem in said
    assert said.count("\n") == 1
    assert not out.exists()
