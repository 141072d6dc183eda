"""transformers' `generate` with the folder `custom_generate/sjd2` draws the tokens of `decode`."""

from functools import partial

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from sjd2_lightning.decoding import DecodingConfig, Sampling, decode
from sjd2_lightning.models.registry import build_shrunken
from tests.tools.source import REPO

FOLDER = str(REPO / "custom_generate" / "sjd2")
PROMPTS = ("a red cat", "a dog on a mat, and more words")
SIZES = {"chameleon": (64, 64), "emu3": (24, 32), "glm_image": (96, 64)}


@pytest.fixture(scope="module", autouse=True)
def cache_of_modules(tmp_path_factory):
    """transformers copies the method into a cache and imports it from there."""
    with pytest.MonkeyPatch.context() as patch:
        place = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", place)
        yield


@pytest.fixture(scope="module", params=list(SIZES))
def backbone(request):
    return build_shrunken(request.param).eval()


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Ids and mask (B, P), padded at the left as processors do."""
    flipped = [torch.tensor(row).flip(0) for row in rows]
    mask = pad_sequence([torch.ones_like(row) for row in flipped], batch_first=True).flip(1)
    return {"input_ids": pad_sequence(flipped, batch_first=True).flip(1), "attention_mask": mask}


def call(backbone, layout) -> dict:
    """What a script hands to `generate` for these prompts."""
    words = padded([backbone.prompt_ids(prompt, layout) for prompt in PROMPTS])
    if backbone.FAMILY == "glm_image":
        grids = [(1, *grid) for grid in reversed(layout.grids)]
        words["image_grid_thw"] = torch.tensor(grids)
    return words


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_tokens_are_those_of_decode(backbone, scale):
    layout = backbone.layout(*SIZES[backbone.FAMILY])
    sampling = Sampling(temperature=0.9, top_k=20, guidance_scale=scale)
    wanted = decode(
        backbone, PROMPTS, [5, 6], DecodingConfig("sjd2", window=8, num_levels=0, sampling=sampling), layout
    )
    model, given = backbone.model, call(backbone, layout)
    generate = partial(model.generate, custom_generate=FOLDER, trust_remote_code=True)
    own = {"image_size": SIZES["emu3"]} if backbone.FAMILY == "emu3" else {}
    if scale != 1:
        empty = padded([backbone.unconditional_ids(layout, backbone.prompt_ids(p, layout)) for p in PROMPTS])
        own["negative_prompt_ids"] = empty["input_ids"]
        own["negative_prompt_attention_mask"] = empty["attention_mask"]
    sampled = {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 1.0, "guidance_scale": scale}
    found = generate(**given, **own, **sampled, seed=5, window=8, max_new_tokens=9)
    num = given["input_ids"].shape[1]
    assert torch.equal(found[:, :num], given["input_ids"])
    tokens = backbone.slot_token_ids[wanted.slot_ids]
    assert torch.equal(found[:, num : num + layout.num_slots], tokens)
    behind = found[0, num + layout.num_slots :].tolist()
    newline = [backbone.tokens.newline] if backbone.NEWLINE else []
    assert behind == [*newline, *getattr(backbone.tokens, "closing", ())]


def test_greedy_and_seeds_of_torch(backbone):
    """Without `seed` the numbers are torch's; greedy needs none; the answer may be a dictionary."""
    layout = backbone.layout(*SIZES[backbone.FAMILY])
    given = call(backbone, layout) | {"image_size": SIZES[backbone.FAMILY], "custom_generate": FOLDER}
    given |= {"trust_remote_code": True, "top_k": 0, "top_p": 1.0, "guidance_scale": 1.0}
    draw = partial(backbone.model.generate, **given)
    torch.manual_seed(3)
    first, other = draw(do_sample=True), draw(do_sample=True)
    torch.manual_seed(3)
    assert torch.equal(draw(do_sample=True), first)
    assert not torch.equal(first, other)
    method = DecodingConfig("ar", window=1, sampling=Sampling(temperature=0.0, guidance_scale=1.0))
    wanted = backbone.slot_token_ids[decode(backbone, PROMPTS, [0, 1], method, layout).slot_ids]
    greedy = draw(do_sample=False, return_dict_in_generate=True).sequences
    num = given["input_ids"].shape[1]
    assert torch.equal(greedy[:, num : num + layout.num_slots], wanted)


def test_what_cannot_be_kept_to_is_refused(backbone):
    layout = backbone.layout(*SIZES[backbone.FAMILY])
    given = call(backbone, layout) | {"custom_generate": FOLDER, "trust_remote_code": True}
    draw = backbone.model.generate
    with pytest.raises(ValueError, match="streamer has no meaning here; leave it out"):
        draw(**given, streamer=object())
    with pytest.raises(ValueError, match=r"guidance_scale=2\.0: needs negative_prompt_ids"):
        draw(**given, guidance_scale=2.0)
    cut = {"input_ids": given["input_ids"][:, :-1], "attention_mask": None, "image_grid_thw": None}
    with pytest.raises(ValueError, match=r"must end in the start of an image|image_size: give"):
        draw(**{**given, **cut}, guidance_scale=1.0)
