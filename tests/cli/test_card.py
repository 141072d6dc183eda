"""The card of an export: what it is of, and commands that are whole."""

from sjd2_lightning.cli.card import Card
from tests.tools.configurations import typed


def test_a_card_says_what_it_is_and_how_to_use_it():
    config = typed("train", "export_dir=outputs/mine/model", "data.data_dir=data/photos", "data.batch_size=8")
    card = Card.of(config, 100, "my own, CC-BY 4.0").text("outputs/mine/model")
    for text in (
        "# weights/tiny, fine-tuned",
        "with noisy codes",
        "100 steps on `photos`",
        "Images of 128 x 128 pixels",
        'Pipeline.load("outputs/mine/model")',
        "- `data.batch_size=8`",
        "Pictures: my own, CC-BY 4.0",
    ):
        assert text in card
    assert "Pictures:" not in Card.of(config, 100, "").text("here")


def test_random_weights_and_plain_training_are_named():
    config = typed("train", "noise=off", "model=emu3", "model.init=random_tiny")
    card = Card.of(config, 1, "").text("here")
    assert "# random_tiny (a shrunken emu3, random weights), fine-tuned" in card
    assert "Fine-tuned plainly" in card
