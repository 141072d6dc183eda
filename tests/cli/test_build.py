"""Prompts are those of the data at hand, unless others are named."""

from hydra import compose, initialize_config_dir
from PIL import Image

from sjd2_lightning.cli.build import build_prompts
from sjd2_lightning.cli.prepare import main as prepare
from sjd2_lightning.config.reading import conf_dir, train_config


def texts(*overrides: str) -> list[str]:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = train_config(compose("train", list(overrides)))
    return [item.prompt for item in build_prompts(config, 4)]


def test_own_pictures_bring_their_prompts(tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(12):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(photos / f"p{number}.png")
        (photos / f"p{number}.txt").write_text(f"picture {number}\n")
    out = tmp_path / "shards"
    prepare(["folder", "--input", str(photos), "--out", str(out), "--val-share", "0.5", "--workers", "1"])
    *_, command = capsys.readouterr().out.strip().splitlines()
    told = f"sjd2 train data=raw data.data_dir={out} data.prompt_file={out / 'prompts.json'}"
    assert command == f"train on them: {told}"
    own = texts(*told.split()[2:])
    assert len(own) == 4
    assert all(text.startswith("picture ") for text in own)
    assert texts("data=raw", f"data.data_dir={out}") == own, "prompts.json is read without being named"
    (tmp_path / "other.txt").write_text("a heart\n")
    assert texts("data=raw", f"data.data_dir={out}", f"data.prompt_file={tmp_path / 'other.txt'}") == [
        "a heart"
    ]
    emoji = texts()
    assert not set(emoji) & set(own)
    assert texts(f"data.data_dir={out}") == emoji, "the embedded set is built there, and has its own names"
