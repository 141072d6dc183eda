"""`sjd2 generate`: files, their metadata, one line a picture."""

import json

import pytest
from PIL import Image

from sjd2_lightning.__main__ import main

SMALL = ["weights=model", "model.image_size=[32,32]", "decoding.window=8", "device=cpu"]


def generated(capsys, *words):
    main(["generate", *words, *SMALL])
    return capsys.readouterr().out.splitlines()


def test_pictures_lines_and_metadata(tmp_path, capsys):
    out = tmp_path / "drawn"
    words = ["red heart", "a/b: c", "-n", "2", "--seed", "5", "--compare", "ar", "--out", str(out)]
    lines = generated(capsys, *words)
    names = ("0-red-heart-5", "0-red-heart-6", "1-a-b-c-5", "1-a-b-c-6")
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"{name}-{m}.png" for name in names for m in ("ar", "sjd2")),
        "sheet.png",
    ]
    pictures, sheet = lines[:-1], lines[-1]
    assert len(pictures) == 8
    assert sheet == f"sheet: {out / 'sheet.png'}"
    for line in pictures:
        path, _, said = line.partition(": ")
        image = Image.open(path)
        assert image.size == (32, 32)
        assert f"{image.text['passes']} passes" in said
        assert image.text["prompt"] in ("red heart", "a/b: c")
        method = json.loads(image.text["method"])
        assert path.endswith(f"-{image.text['seed']}-{method['name']}.png")
        assert image.text["model"] == "weights/tiny"
        assert ("the same image" in said) == (method["name"] == "sjd2"), "replay is proved by its tokens"
    assert Image.open(out / "sheet.png").size[0] > Image.open(out / "sheet.png").size[1]


def test_a_lossy_method_is_another_image(tmp_path, capsys):
    words = ["red heart", "--method", "sjd2_pure", "--compare", "ar", "--out", str(tmp_path)]
    assert "another image" in generated(capsys, *words)[1]


def test_prompts_of_a_file(tmp_path, capsys):
    (tmp_path / "prompts.json").write_text(
        json.dumps(["red heart", {"prompt": "cat", "key": "c", "seed": 9}])
    )
    lines = generated(capsys, "--file", str(tmp_path / "prompts.json"), "--out", str(tmp_path / "out"))
    assert [line.partition(":")[0].rpartition("/")[2] for line in lines[1:]] == ["1-c-9-sjd2.png", "sheet"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is no prompt; give one in quotation marks"),
        ([" "], "prompt ' ' is empty"),
        (["cat", "-n", "0"], "-n 0 --seed 0: need at least one picture"),
        (["cat", "--method", "sjd3"], "method 'sjd3': did you mean `sjd`"),
        (["cat", "modl=tiny"], "modl"),
        (["cat", "decoding.window=0"], "decoding.window=0"),
        (["--file", "nothing.txt"], "nothing.txt"),
    ],
)
def test_refusals_are_short_and_leave_nothing(tmp_path, words, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["generate", *words])
    assert message in str(ended.value)
    assert "Traceback" not in str(ended.value)
    assert not list(tmp_path.iterdir())
