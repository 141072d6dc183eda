"""Released models on the command line: shrunken copies are trained, decoded, exported and compared; plans."""

import re

import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image

from benchmarks.shipped import shipped_pixels
from sjd2_lightning.cli.evaluate import evaluate
from sjd2_lightning.cli.plan import USABLE
from sjd2_lightning.cli.prepare import main as prepare
from sjd2_lightning.cli.train import train
from sjd2_lightning.config.reading import ConfigError, conf_dir
from sjd2_lightning.data.datamodule import CaptionLimit
from sjd2_lightning.evaluation.prompts import class_prompts
from sjd2_lightning.models.imagenet import class_number
from sjd2_lightning.models.registry import build_shrunken, load_backbone
from sjd2_lightning.training.module import SJD2Module, TrainingNoise
from sjd2_lightning.training.optimizer import OptimizerConfig
from tests.tools.tiny_backbones import tiny_chameleon

SMALL = (
    "metrics=none",
    "logger=none",
    "data.views=1",
    "data.max_images=4",
    "data.batch_size=2",
    "model.dtype=float32",
)
TRAINING = (
    "trainer=cpu",
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "trainer.limit_val_batches=1",
    "callbacks.progress_bar=null",
    "callbacks.sampling.num_prompts=1",
    "validate_first=false",
    "decoding.window=8",
)

DOCUMENTED = ("lumina_mgpt", "emu3", "janus_pro", "janus_pro_7b", "simple_ar", "simple_ar_1_5b", "glm_image")
DOCUMENTED += ("llamagen", "llamagen_class")  # all of them but other sizes of Lumina-mGPT
FOLDERS = {
    "emu3": "emu3_gen",
    "simple_ar": "simple_ar/simplear_0.5B_rl",
    "simple_ar_1_5b": "simple_ar/simplear_1.5B_rl",
}


@pytest.fixture
def composed(tmp_path, monkeypatch):
    """Composes a root in an empty folder, where no weights lie."""
    monkeypatch.chdir(tmp_path)

    def compose_here(root: str, *overrides: str):
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return compose(
                root, [f"run_dir={tmp_path / 'run'}", f"data.data_dir={tmp_path / 'data'}", *overrides]
            )

    return compose_here


@pytest.mark.parametrize(
    ("model", "side", "peft"),
    [
        ("lumina_mgpt", 32, "lora"),
        ("emu3", 16, "null"),
        ("janus_pro", 64, "lora"),
        ("simple_ar", 32, "lora"),
        ("glm_image", 64, "lora"),
        ("llamagen", 64, "lora"),
    ],
)
def test_a_family_trains_decodes_and_exports(composed, tmp_path, model, side, peft):
    """Two steps, a validation with sampling, an export; then three methods on the exported weights."""
    chosen = [f"model={model}", "model.init=random_tiny", f"model.image_size=[{side},{side}]", *SMALL]
    drafts = ["corrector=default", "corrector.width=4"] if peft == "lora" else []
    metrics = train(composed("train", *chosen, *TRAINING, f"model.peft={peft}", *drafts))
    assert metrics["train/loss"] > 0
    assert "val/nfe" in metrics
    run = tmp_path / "run"
    assert list(run.glob("samples/step_*/images/sjd2/*.png"))
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(".lora_" in name or ".corrector." in name for name in state) is (peft == "lora")
    assert any(".corrector." in name for name in state) is bool(drafts)
    for folder in (run / "model", run / "model" / "adapter"):
        assert (folder / "corrector.safetensors").is_file() is bool(drafts)
    assert (run / "model" / "adapter").is_dir() is (peft == "lora")

    report = evaluate(
        composed(
            "evaluate",
            *(word for word in chosen if word != "model.init=random_tiny"),  # the weights say it themselves
            f"model.path={run / 'model'}",
            f"weights={run / 'model'}",
            f"run_dir={tmp_path / 'compared'}",
            "num_prompts=1",
            "compare=[ar,sjd,sjd2]",
            "decoding.window=8",
            "warm_up=false",
        )
    )
    called = f"{run / 'model'}, trained from random_tiny"
    assert report["provenance"]["weights"].startswith(called)
    assert called in report["warnings"][0]
    for name in ("report.md", "report.html"):
        assert "random weights" in (tmp_path / "compared" / name).read_text()
    assert {name: method["num_images"] for name, method in report["methods"].items()} == {
        "ar": 1,
        "sjd": 1,
        "sjd2": 1,
    }


CLASSES = ("golden retriever", "tench", "7", "goldfish", "207", "jay")


@pytest.fixture
def class_pictures(tmp_path):
    """Shards of a few pictures whose captions are classes."""
    photos, shards = tmp_path / "photos", tmp_path / "shards"
    photos.mkdir()
    for number, caption in enumerate(2 * CLASSES):
        Image.new("RGB", (64, 64), (20 * number, 99, 0)).save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text(caption)
    model = ["--model-family", "llamagen", "--model-path", "random_tiny", "--image-size", "64"]
    prepare(["folder", "--input", str(photos), "--out", str(shards), "--val-share", "0.3", *model])
    return shards


def test_a_model_of_classes_is_a_dry_run_too(composed, tmp_path):
    """`evaluate.py model=llamagen_class model.init=random_tiny`, whose prompts are names of classes."""
    words = [word for word in SMALL if word != "metrics=none"]
    chosen = ["model=llamagen_class", "model.init=random_tiny", "decoding.window=8", "warm_up=false", *words]
    report = evaluate(composed("evaluate", *chosen, "compare=[ar,sjd2,sjd2_exact]"))
    prompts = [item.prompt for item in class_prompts(2)]
    assert all(0 <= class_number(prompt) < 1000 for prompt in prompts)
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(prompt in page for prompt in prompts)
    assert report["methods"]["sjd2"]["equal_to_ar"] == 1
    assert "random_tiny" in report["provenance"]["weights"]
    assert report["methods"]["ar"]["clip_score"] is None, "the shipped scorer has seen scenes alone"
    assert any("no real pictures are known for these data" in line for line in report["warnings"])


def test_a_model_of_classes_trains_decodes_and_exports(composed, tmp_path, class_pictures):
    own = ["model=llamagen_class", *SMALL, "data=shards", f"data.data_dir={class_pictures}"]
    metrics = train(composed("train", *own, *TRAINING, "model.init=random_tiny", "model.peft=lora"))
    assert metrics["train/loss"] > 0
    assert "val/nfe" in metrics
    weights = tmp_path / "run" / "model"
    assert load_backbone("llamagen", weights).tokens.condition == "class"
    tuned = [f"model.path={weights}", f"weights={weights}", f"run_dir={tmp_path / 'compared'}"]
    few = ["num_prompts=2", "compare=[ar,sjd,sjd2]", "decoding.window=8", "warm_up=false"]
    report = evaluate(composed("evaluate", *own, *tuned, *few, "model.image_size=[64,64]"))
    assert report["methods"]["sjd2"]["num_images"] == 2
    assert report["methods"]["sjd2"]["equal_to_ar"] == 1
    with pytest.raises(ValueError, match=r"model\.condition=text: .* drawn from classes; use model=lla"):
        evaluate(composed("evaluate", "model=llamagen", *own[1:], *tuned, *few, "model.image_size=[64,64]"))


def test_captions_that_are_no_classes_are_refused(composed, tmp_path, class_pictures):
    chosen = ["model=llamagen_class", "model.init=random_tiny", *SMALL]
    with pytest.raises(ConfigError, match=r"model\.condition=class: captions of data\.source=scenes name"):
        train(composed("train", *chosen, *TRAINING))
    (tmp_path / "prompts.txt").write_text("a red cat\n")
    asked = [f"data.prompt_file={tmp_path / 'prompts.txt'}", "decoding.window=8", "compare=[ar]"]
    with pytest.raises(
        ValueError, match=r"'a red cat': this model is drawn from classes; give a number below"
    ):
        evaluate(composed("evaluate", *chosen, *asked))
    layout = (backbone := build_shrunken("llamagen", condition="class")).layout(64, 64)
    assert CaptionLimit(backbone, layout)("golden retriever") == ""
    with pytest.raises(
        ValueError, match=r"data\.data_dir: a caption is no prompt of this model: prompt 'a cat'"
    ):
        CaptionLimit(backbone, layout)("a cat")


@pytest.mark.parametrize(
    ("model", "parameters", "tokens"),
    [
        ("lumina_mgpt", 7.0e9, 48 * 49 - 1),
        ("lumina_mgpt_1024", 7.0e9, 64 * 65 - 1),
        ("emu3", 8.8e9, 90 * 91 - 1),
        ("simple_ar", 0.55e9, 64 * 64),
        ("simple_ar_1_5b", 1.64e9, 64 * 64),
        ("glm_image", 10.1e9, 16 * 16 + 32 * 32),
        ("llamagen", 0.77e9, 32 * 32),
        ("llamagen_class", 0.77e9, 24 * 24),
    ],
)
def test_the_plan_needs_no_weights(composed, capsys, model, parameters, tokens):
    plan = train(composed("train", f"model={model}", "print_plan=true", "data.batch_size=1"))
    assert plan["parameters"] == pytest.approx(parameters, rel=0.02)
    assert plan["tokens_per_image"] == tokens
    assert plan["missing_files"] > 0
    printed = capsys.readouterr().out
    assert "hf download" in printed
    assert f"weights/{FOLDERS.get(model, model.replace('mgpt', 'mgpt_7b'))}" in printed
    less = train(
        composed("train", f"model={model}", "print_plan=true", "data.batch_size=1", "model.peft=lora")
    )
    assert less["trained"] < 0.02 * plan["trained"]
    assert less["training_gib"] < 0.75 * plan["training_gib"]


@pytest.mark.parametrize("model", ["simple_ar", "llamagen_class"])
def test_an_evaluation_has_a_plan_too(composed, capsys, tmp_path, model):
    words = (f"model={model}", "print_plan=true")
    decoding = evaluate(composed("evaluate", *words, "compare=[ar,sjd2]"))
    training = train(composed("train", *words, "compare=[ar,sjd2]", "callbacks.sampling.batch_size=1"))
    assert decoding["decoding_gib"] == training["decoding_gib"]
    assert not decoding.keys() & {"trained", "training_gib"}
    assert decoding["missing_files"] > 0
    shown = printed(capsys).partition("; trained")[0]
    assert "decoding, 1 at once, window" in shown
    assert "hf download" in shown
    assert "training" not in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", DOCUMENTED)
def test_what_the_documents_say_of_memory_is_the_plan(composed, capsys, repo, model):
    settings = [f"model={model}", "print_plan=true", "data.batch_size=1", "callbacks.sampling.batch_size=1"]
    few = train(composed("train", *settings, "trainer=gpu", "model.peft=lora"))
    shared = ["model.dtype=float32", "trainer.devices=8", "trainer.strategy=fsdp"]
    whole = train(composed("train", *settings, "trainer=gpu", *shared))
    figures = [few["training_gib"], whole["training_gib"], few["decoding_gib"]]
    text = (repo / "docs" / "models.md").read_text()
    assert f"| {' / '.join(f'{figure:.1f}' for figure in figures)} |" in text
    weights = f"{few['parameters'] * 2 / 2**30:.1f} GiB"
    [row] = [line for line in text.splitlines() if line.startswith(f"| `{model}`")]
    assert row.endswith(f"| {weights} |")
    for line in (repo / "conf" / "model" / f"{model}.yaml").read_text().splitlines():
        assert "GiB" not in line or weights in line
    printed = capsys.readouterr().out
    assert "training, batch 1, bf16-mixed" in printed
    assert "weights in bfloat16" in printed


def test_the_plan_says_what_fits_on_a_card(composed, capsys):
    settings = ["model=lumina_mgpt", "print_plan=true", "model.peft=lora", "trainer=gpu"]
    train(composed("train", *settings))
    found = re.findall(
        r"a card of (\d+) GB: training as asked at batch (\d+), decoding at batch (\d+)", printed(capsys)
    )
    assert [int(card) for card, *_ in found] == [24, 48, 80]
    for card, training, decoding in found:
        for more, fits in ((0, True), (1, False)):
            batches = [f"data.batch_size={int(training) + more}"]
            batches += [f"callbacks.sampling.batch_size={int(decoding) + more}"]
            plan = train(composed("train", *settings, *batches))
            assert (plan["training_gib"] <= USABLE * int(card)) is fits
            assert (plan["decoding_gib"] <= USABLE * int(card)) is fits
    capsys.readouterr()
    train(composed("train", *settings[:2]))
    assert "a card of 24 GB: training as asked does not fit, training an adapter at batch" in printed(capsys)


def printed(capsys) -> str:
    """What was printed, without the line breaks of a narrow terminal."""
    return " ".join(capsys.readouterr().out.split())


def test_the_plan_of_the_shipped_model_counts_its_weights(composed, repo):
    plan = train(composed("train", "print_plan=true", f"model.path={repo / 'weights/tiny'}"))
    backbone = load_backbone("chameleon", repo / "weights" / "tiny")
    assert plan["parameters"] == sum(p.numel() for p in backbone.model.parameters())
    assert plan["tokens_per_image"] == backbone.layout(shipped_pixels(), shipped_pixels()).num_slots
    assert plan["missing_files"] == 0


INT8 = ("model.quantize=int8",)


def test_the_plan_knows_of_rounded_weights(composed):
    settings = ("model=lumina_mgpt", "print_plan=true", "data.batch_size=1")
    whole, rounded = (train(composed("train", *settings, *more)) for more in ((), ("model.quantize=int8",)))
    saved = whole["decoding_gib"] - rounded["decoding_gib"]
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008)  # a byte of each weight
    assert saved == pytest.approx(layers / 2**30, rel=0.01)
    assert whole["training_gib"] == rounded["training_gib"], "all weights are trained whole"
    less, least = (train(composed("train", *settings, "model.peft=lora", *more)) for more in ((), INT8))
    assert less["training_gib"] - least["training_gib"] == pytest.approx(layers / 2**30, rel=0.01)
    assert least["training_gib"] < 24 * USABLE / 2


def test_the_plan_counts_the_corrector_of_drafts(composed):
    plain = train(composed("train", "model=lumina_mgpt", "print_plan=true"))
    drafts = train(composed("train", "model=lumina_mgpt", "print_plan=true", "corrector=default"))
    numbers = 3 * 4096 * 64 + 2 * 64
    for name in ("parameters", "trained"):
        assert drafts[name] - plain[name] == numbers


def test_the_plan_knows_of_states_of_8_bits(composed):
    settings = ("model=janus_pro", "model.dtype=float32", "print_plan=true", "data.batch_size=1")
    names = ("adamw", "adamw8bit")
    whole, less = (train(composed("train", *settings, f"optimizer={name}")) for name in names)
    saved = whole["training_gib"] - less["training_gib"]
    assert saved * 2**30 == pytest.approx(whole["trained"] * 2 * (4 - 1 - 4 / 256))


def test_missing_weights_are_refused_with_the_command(composed):
    for model, command in (
        ("emu3", "hf download BAAI/Emu3-Gen-hf"),
        ("lumina_mgpt", "sjd2 convert --trunk"),
    ):
        with pytest.raises(ConfigError) as error:
            train(composed("train", f"model={model}"))
        assert command in str(error.value)
        assert "model.path=" in str(error.value)


def test_training_puts_the_trunk_into_train_mode_and_nothing_else():
    module = SJD2Module(tiny_chameleon(3), TrainingNoise(), OptimizerConfig(), (4, 4))
    module.backbone.eval()
    module.on_fit_start()
    assert module.backbone.trunk.layers[0].training
    assert not module.backbone.image_tokenizer.training
