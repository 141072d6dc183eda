"""The wheel is whole: every command works in an empty folder, without a checkout and with an empty home."""

import os
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
import venv
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from sjd2_lightning.__main__ import COMMANDS
from tests.tools.source import REPO

pytestmark = pytest.mark.slow
SMALL = ("model.image_size=[32,32]", "decoding.window=8", "metrics=none", "logger=none")
OWN = ("data=shards", "data.data_dir=data/photos")


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> Path:
    """The folder of the commands in a fresh environment: the wheel, and the other packages of this one."""
    pytest.importorskip("hatchling", reason="builds the wheel without a network")
    root = tmp_path_factory.mktemp("wheel")
    build = [
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "--wheel-dir",
        str(root),
        str(REPO),
    ]
    subprocess.run([sys.executable, "-m", *build], check=True)
    venv.create(root / "venv", with_pip=True)
    python = root / "venv" / "bin" / "python"
    [wheel] = root.glob("*.whl")
    subprocess.run(
        [python, "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", wheel],
        check=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    places = [path for path in sys.path if path.endswith("site-packages")] or [sysconfig.get_path("purelib")]
    [own] = (root / "venv" / "lib").glob("python*/site-packages")
    (own / "others.pth").write_text(
        "".join(f"{place}\n" for place in places)
    )  # their .pth files are not read
    return python.parent


@pytest.fixture
def outside(commands, tmp_path):
    """Runs a command there; gives what it printed."""
    (tmp_path / "home").mkdir()
    (tmp_path / "empty").mkdir()
    kept = ("LANG", "OMP_NUM_THREADS", "LD_LIBRARY_PATH")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {
        "HOME": str(tmp_path / "home"),
        "PATH": f"{commands}:/usr/bin:/bin",
        "HF_HUB_OFFLINE": "1",
    }

    def run(*words: str) -> str:
        found = subprocess.run(
            [commands / words[0], *words[1:]],
            cwd=tmp_path / "empty",
            env=environment,
            capture_output=True,
            text=True,
        )
        assert found.returncode == 0, f"{words}: {found.stdout}{found.stderr}"
        assert str(REPO) not in found.stdout + found.stderr
        return found.stdout + found.stderr

    run.folder, run.environment = tmp_path / "empty", environment
    return run


def test_from_pictures_to_a_report(outside):
    """As the tutorial goes, on eight pictures, with every command that takes no files from elsewhere."""
    photos = outside.folder / "photos"
    photos.mkdir()
    for number in range(8):
        Image.new("RGB", (32, 32), (30 * number, 0, 90)).save(photos / f"p{number}.png")
        (photos / f"p{number}.txt").write_text(f"picture {number}")
    code = "import sjd2_lightning; print(sjd2_lightning.__file__)"
    assert str(REPO) not in outside("python", "-c", code)
    assert "ready: model=tiny" in outside("sjd2", "doctor")
    assert "sheet: outputs/generate/sheet.png" in outside("sjd2", "generate", "red heart", *SMALL)
    model = ("--model-family", "chameleon", "--model-path", "weights/tiny", "--image-size", "32")
    told = outside("sjd2", "prepare", "folder", "--input", "photos", "--out", "data/photos", *model)
    [line] = [line for line in told.splitlines() if line.startswith("train on them: ")]
    words = line.removeprefix("train on them: ").replace("'", "").split()
    few = (
        "trainer.max_steps=1",
        "validate_first=false",
        "callbacks.sampling.num_prompts=1",
        "callbacks.progress_bar=null",
    )
    assert "weights: outputs/mine/model" in outside(*words, *SMALL, *few, "run_dir=outputs/mine")
    tuned = ("weights=outputs/mine/model", "run_dir=outputs/report", "compare=[ar,sjd2]", "num_prompts=1")
    assert "page:" in outside("sjd2", "evaluate", *OWN, *SMALL, *tuned, "warm_up=false")
    assert (outside.folder / "outputs/report/report.html").is_file()
    outside("sjd2", "pairs", "data/photos/codes/train", "pairs.safetensors", "--rank", "2")
    outside("sjd2", "teacher", "data/photos/codes", "drawn", "--weights", "outputs/mine/model")
    code = "from sjd2_lightning import Pipeline; print(Pipeline.load('outputs/mine/model')('cat').images)"
    assert "size=32x32" in outside("python", "-c", code), "and it knows its size"
    assert not list((outside.folder.parent / "home").glob("*.yaml")), "nothing of ours in the home"


def test_every_command_explains_itself(outside):
    shown = outside("sjd2", "--help")
    assert all(f"  {name} " in shown for name in COMMANDS)
    for name in COMMANDS:
        assert f"sjd2 {name}" in outside("sjd2", name, "--help")
    for script in ("sjd2-train", "sjd2-evaluate"):
        assert "usage: sjd2" in outside(script, "--help")
    assert not list(outside.folder.iterdir())


def test_a_plan_needs_no_files(outside):
    shown = outside("sjd2", "evaluate", "model=simple_ar", "print_plan=true")
    assert "tokens an image: 4,096 (64 x 64 codes)" in shown
    assert "decoding, 1 at once" in shown
    assert "missing: weights/simple_ar/simplear_0.5B_rl" in shown
    assert "hf download Daniel0724/SimpleAR" in shown
    assert not list(outside.folder.iterdir())


def test_the_page_opens(commands, outside):
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["play", "--port", str(port), "--no-browser", "device=cpu"]
    page = subprocess.Popen([commands / "sjd2", *words], cwd=outside.folder, env=outside.environment)
    try:
        for _ in range(300):
            assert page.poll() is None
            with suppress(OSError):
                text = urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5).read().decode()
                break
            time.sleep(1)
        assert "gradio" in text
    finally:
        page.terminate()
        page.wait(60)
