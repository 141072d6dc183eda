"""The CLIP recipe: batches without false negatives, a loss that can be learnt, a folder the scorer reads."""

import json
from itertools import islice

import lightning as L
import pytest
import torch

from sjd2_lightning.data.sources.scene_captions import read_caption
from sjd2_lightning.data.sources.scene_pixels import GROUND_COLOURS
from sjd2_lightning.data.sources.scenes import Variety, held_out_scene, training_scene
from sjd2_lightning.metrics.alignment import load_clip_scorer, own_scores
from sjd2_lightning.models.small import train_text_tokenizer
from sjd2_lightning.training.recipes import ClipRecipe
from sjd2_lightning.training.recipes.clip import (
    ClipModule,
    SceneBatches,
    ScenePairs,
    block_shuffled,
    painted,
    recall_at,
)

SMALL = {
    "patch_size": 8,
    "vision_width": 32,
    "vision_layers": 1,
    "text_width": 32,
    "text_layers": 1,
    "head_width": 16,
    "embed_dim": 16,
    "patch_dropout": 0.0,
    "text_dropout": 0.0,
}
FEW = Variety(12, True)


def clip(text_dir: str, out_dir: str | None = None, **sizes) -> ClipModule:
    """A small CLIP of images of 32 pixels."""
    return ClipModule(ClipRecipe(text_dir=text_dir, **SMALL | sizes), out_dir, image_size=32)


@pytest.fixture(scope="module")
def text_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    captions = [training_scene(0, index, FEW).caption for index in range(100)]
    train_text_tokenizer(captions, 8, 600).save_pretrained(folder)
    return str(folder)


def quiet_trainer(**options):
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


def test_training_batches_never_ask_twice_for_the_same():
    batches = list(islice(SceneBatches(24, 8, FEW, seed=3), 4))
    for batch in batches:
        assert batch.images.shape == (24, 3, 8, 8)
        asked = [read_caption(caption, tuple(GROUND_COLOURS)) for caption in batch.captions]
        assert None not in asked
        wishes = [repr((sorted(a.counts), a.relation, sorted(a.sizes), a.ground)) for a in asked]
        assert len(set(wishes)) == 24
    assert batches[0].captions != batches[1].captions
    again = next(iter(SceneBatches(24, 8, FEW, seed=3)))
    assert again.captions == batches[0].captions
    assert again.images.equal(batches[0].images)


def test_validation_holds_out_what_training_never_asks_for():
    batches = list(ScenePairs(4, 8, FEW).val_dataloader())
    captions = [caption for batch in batches for caption in batch.captions]
    assert len(captions) > 60
    held_out = {held_out_scene("two", 0, index, FEW).caption for index in range(32)}
    assert len(held_out & set(captions)) > 3


@pytest.mark.parametrize("grid", [2, 4])
def test_blocks_change_places_and_nothing_else(grid):
    torch.manual_seed(0)
    images = torch.rand(3, 3, 8, 16)
    shuffled = block_shuffled(images, grid)
    rows, columns = 8 // grid, 16 // grid

    def blocks(image):
        cut = image.unfold(1, rows, rows).unfold(2, columns, columns).permute(1, 2, 0, 3, 4).flatten(0, 1)
        return sorted(block.flatten().tolist() for block in cut)

    for before, after in zip(images, shuffled, strict=True):
        assert blocks(before) == blocks(after)
        assert not before.equal(after)


def test_recall_counts_own_captions_among_the_nearest():
    embeds = torch.eye(4)
    assert recall_at(1, embeds, embeds) == 1
    assert recall_at(1, embeds, embeds.roll(1, 0)) == 0
    swapped = embeds[[1, 0, 2, 3]] + 0.5 * embeds  # own caption second for two of four
    assert recall_at(1, embeds, swapped) == 0.5
    assert recall_at(2, embeds, swapped) == 1


def test_text_is_pooled_at_its_end_whatever_follows(text_dir):
    torch.manual_seed(0)
    module = clip(text_dir).eval()
    images = torch.rand(2, 3, 32, 32)
    _, short = module.embed(images, ["red apple", "cat"])
    _, same = module.embed(images, ["red apple", "a very long caption of a grinning cat with hearts"])
    torch.testing.assert_close(short[0], same[0])
    assert not torch.allclose(short[1], same[1])


def test_a_few_pairs_are_learnt_and_told_from_shuffled_copies(text_dir):
    torch.manual_seed(0)
    batch = next(iter(SceneBatches(8, 32, FEW, seed=0)))
    module = clip(text_dir)
    module.log = lambda *args, **kwargs: None
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    losses = []
    for _ in range(80):
        losses.append(module.training_step(batch, 0))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.4 * losses[0]
    own, texts = module.eval().embed(batch.images, batch.captions)
    assert recall_at(1, own, texts) == 1
    copies, _ = module.embed(block_shuffled(batch.images, 4), batch.captions)
    assert (own * texts).sum(-1).mean() > (copies * texts).sum(-1).mean() + 0.1


def test_training_ends_in_a_folder_that_scores_as_the_module_does(text_dir, tmp_path):
    L.seed_everything(0)
    out = tmp_path / "clip"
    module = clip(text_dir, str(out))
    trainer = quiet_trainer(max_steps=2, val_check_interval=2)
    trainer.fit(module, ScenePairs(16, 32, FEW))
    measured = trainer.callback_metrics
    assert 0 <= measured["val/recall_at_1"] <= measured["val/recall_at_5"] <= 1
    assert 0 < float(measured["val/recall_at_1_by_chance"]) < 1 / 60

    scorer = load_clip_scorer(out)
    assert scorer.metric_name == "clip_score_TinySceneCLIP"
    pairs = painted([held_out_scene("two", 1, index, FEW) for index in range(8)], 32)
    with torch.no_grad():
        image_embeds, text_embeds = module.eval().embed(pairs.images, pairs.captions)
    expected = 100 * (image_embeds * text_embeds).sum(-1).clamp(min=0)
    images = (pairs.images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    found = own_scores(scorer.embed_images(images), scorer.embed_captions(pairs.captions))
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0.2)  # saved in fp16


def test_only_training_captions_lose_tokens_and_never_their_end(text_dir):
    torch.manual_seed(0)
    module = clip(text_dir, text_dropout=0.5)
    seen = []
    module.clip.encode_text = lambda ids, normalize: seen.append(ids)
    captions, images = ["red apple and a grinning cat"] * 50, torch.rand(50, 3, 32, 32)
    module.eval().embed(images, captions)
    module.train().embed(images, captions)
    whole, dropped = seen
    lost = dropped != whole
    assert (dropped[lost] == module.tokenizer.unk_token_id).all()
    text = ~torch.isin(whole, torch.tensor(module.tokenizer.all_special_ids))
    assert not lost[~text].any()
    assert 0.4 < lost[text].float().mean() < 0.6


def test_settings_that_do_not_fit_are_named_together(text_dir, tmp_path):
    wrong = {"patch_size": 7, "text_width": 40, "patch_dropout": 1.5}
    with pytest.raises(ValueError, match=r"patch_dropout=1\.5: .*text_width=40: .*patch_size=7: ") as raised:
        clip(text_dir, **wrong)
    assert "vision_width" not in str(raised.value)
    with pytest.raises(ValueError, match=r"no tokenizer\.json in text_dir"):
        clip(str(tmp_path))
    train_text_tokenizer(["cat"], 8, 300).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="has no eos_token"):
        clip(str(tmp_path))
