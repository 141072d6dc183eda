"""The card of an export: what it is of, and commands that are whole."""

from sjd2_lightning.cli.card import model_card
from tests.tools.configurations import typed


def test_a_card_says_what_it_is_and_how_to_use_it():
    config = typed("train", "export_dir=outputs/mine/model", "data.data_dir=data/photos", "data.batch_size=8")
    card = model_card(config, 100, "my own, CC-BY 4.0")
    for text in (
        "# weights/tiny, fine-tuned",
        "with noisy codes",
        "100 steps of 8 pictures a device, of `data/photos`",
        "Images of 128 x 128 pixels",
        'Pipeline.load("outputs/mine/model")',
        "`hf upload OWNER/NAME outputs/mine/model`",
        "Pictures: my own, CC-BY 4.0",
    ):
        assert text in card
    assert "Pictures:" not in model_card(config, 100, "")


def test_random_weights_and_plain_training_are_named():
    card = model_card(typed("train", "noise=off", "model=emu3", "model.init=random_tiny"), 1, "")
    assert "# random_tiny (a shrunken emu3, random weights), fine-tuned" in card
    assert "Fine-tuned plainly" in card
