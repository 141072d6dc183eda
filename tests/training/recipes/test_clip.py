"""The CLIP recipe: batches without false negatives, a loss that can be learnt, a folder the scorer reads."""

import json

import lightning as L
import pytest
import torch

from sjd2_lightning.data.sources.emoji import Picture, load_emoji_index, render
from sjd2_lightning.metrics.alignment import load_clip_scorer, own_scores
from sjd2_lightning.models.small import train_text_tokenizer
from sjd2_lightning.training.recipes import ClipRecipe
from sjd2_lightning.training.recipes.clip import ClipModule, EmojiPairs, recall_at

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


def clip(text_dir: str, out_dir: str | None = None, **sizes) -> ClipModule:
    """A small CLIP of images of 32 pixels."""
    return ClipModule(ClipRecipe(text_dir=text_dir, **SMALL | sizes), out_dir, image_size=32)


@pytest.fixture(scope="module")
def text_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    train_text_tokenizer([item.caption for item in load_emoji_index()[::20]], 8, 600).save_pretrained(folder)
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


def test_training_batches_never_hold_a_concept_twice_and_change_by_epoch():
    data = EmojiPairs(batch_size=64, size=8, seed=3)
    loader = data.train_dataloader()
    items = loader.dataset.items
    assert all(item.split == "train" for item in items)
    epochs = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        epochs.append(list(loader.sampler))
    assert epochs[0] == epochs[2] != epochs[1]
    for order in epochs:
        concepts = [items[index].concept for index in order]
        assert len(set(concepts)) == len(concepts) == len({item.concept for item in items})
    assert {items[i].key for i in epochs[0]} != {items[i].key for i in epochs[1]}


def test_validation_holds_one_picture_of_every_held_out_concept():
    pictures = EmojiPairs(size=8).val_dataloader().dataset
    concepts = [pictures.dataset.items[index].concept for index in pictures.indices]
    held_out = {item.concept for item in load_emoji_index() if item.split == "val"}
    assert sorted(concepts) == sorted(held_out)


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


def test_a_few_pairs_are_learnt(text_dir):
    torch.manual_seed(0)
    items = load_emoji_index()[::450]
    images = torch.stack([torch.tensor(render(item.path, 32)) for item in items]).permute(0, 3, 1, 2) / 255
    batch = Picture(images, [item.caption for item in items], [item.concept for item in items])
    module = clip(text_dir)
    module.log = lambda *args, **kwargs: None
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        losses.append(module.training_step(batch, 0))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
    assert recall_at(1, *module.eval().embed(images, batch.caption)) == 1


def test_training_ends_in_a_folder_that_scores_as_the_module_does(text_dir, tmp_path):
    L.seed_everything(0)
    out = tmp_path / "clip"
    module = clip(text_dir, str(out))
    trainer = quiet_trainer(max_epochs=1, limit_train_batches=2)
    trainer.fit(module, EmojiPairs(batch_size=16, size=32))
    assert (
        0 <= trainer.callback_metrics["val/recall_at_1"] <= trainer.callback_metrics["val/recall_at_5"] <= 1
    )
    assert float(trainer.callback_metrics["val/recall_at_1_by_chance"]) == pytest.approx(1 / 78, rel=0.1)

    scorer = load_clip_scorer(out)
    assert scorer.metric_name == "clip_score_TinyEmojiCLIP"
    items = load_emoji_index()[::500]
    captions = [item.caption for item in items]
    images = torch.stack([torch.tensor(render(item.path, 32)) for item in items])
    with torch.no_grad():
        image_embeds, text_embeds = module.eval().embed(images.permute(0, 3, 1, 2) / 255, captions)
    expected = 100 * (image_embeds * text_embeds).sum(-1).clamp(min=0)
    found = own_scores(scorer.embed_images(images), scorer.embed_captions(captions))
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
    with pytest.raises(ValueError, match="exceeds the"):
        EmojiPairs(batch_size=5000).train_dataloader()
