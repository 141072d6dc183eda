"""What every adapter must pass: a `Case` names a backbone and what transformers says of it; see `CHECKS`.

A new adapter is added to `tests/laws/test_conformance.py`; nothing here knows a family.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sjd2_lightning.decoding import DecodingConfig, NearTies, Sampling, decode, decode_reference
from sjd2_lightning.decoding.config import NOISY
from sjd2_lightning.embedding import EmbeddingSpace
from sjd2_lightning.masks import attention_mask
from sjd2_lightning.models.backbone import ImageLayout, position_ids
from sjd2_lightning.models.image_tokenizer import to_uint8
from sjd2_lightning.models.pretrained import PretrainedBackbone
from sjd2_lightning.models.registry import load_backbone
from sjd2_lightning.training.batch import NoisyCodes, trunk_input
from sjd2_lightning.training.module import SJD2Module, TrainingNoise
from sjd2_lightning.training.optimizer import OptimizerConfig
from tests.tools.operations import Operations

PROMPTS = ("a red cat", "dog")  # of different lengths
AR = DecodingConfig("ar", window=1)

METHODS = ("ar", "jacobi", "sjd", "mc_sjd", "gumbel", "sjd_pp", "sjd_pac", "gsd", "sjd2", "sjd2_pure")


@dataclass(frozen=True)
class Case:
    """A backbone under test.

    Attributes:
        backbone: small, with random weights.
        sizes: (height, width) in pixels that it draws, small ones first.
        refused: sizes that it must refuse.
        newline: whether rows end in one.
        teacher: logits (n, K) of the codes (1, H, W) behind a prompt, by transformers' own path over ids.
        greedy: codes (H, W) that transformers' own path draws greedily at a guidance scale.
        prompts: two that it draws from, of different lengths where they have one.
    """

    backbone: PretrainedBackbone
    sizes: Sequence[tuple[int, int]]
    refused: Sequence[tuple[int, int]]
    newline: bool
    teacher: Callable[[list[int], Tensor, ImageLayout], Tensor]
    greedy: Callable[[str, ImageLayout, float], Tensor]
    prompts: Sequence[str] = PROMPTS

    @property
    def small(self) -> ImageLayout:
        return self.backbone.layout(*self.sizes[0])

    def codes(self, layout: ImageLayout, batch: int = 2, seed: int = 0) -> Tensor:
        rng = torch.Generator().manual_seed(seed)
        return torch.randint(self.backbone.num_codes, (batch, layout.height, layout.width), generator=rng)


class Batch(NamedTuple):
    """What training reads of a batch."""

    captions: Sequence[str]
    image_ids: Tensor


def check_layouts(case: Case) -> None:
    """Slots written out one by one; ids go there and back; other sizes are refused."""
    for height, width in case.sizes:
        layout = case.backbone.layout(height, width)
        step = case.backbone.image_tokenizer.downsample
        assert tuple(step * side for side in layout.grid) == layout.pixels == (height, width)
        if layout.grids:
            assert layout.height == 1
            assert layout.width == sum(rows * columns for rows, columns in layout.grids)
        wanted = []
        for row in range(layout.height):
            for _ in range(layout.width):
                wanted.append(-1)
            if case.newline and row < layout.height - 1:
                wanted.append(case.backbone.num_codes)
        assert layout.forced == tuple(wanted)
        codes = case.codes(layout)
        assert torch.equal(layout.image_ids(layout.slot_ids(codes)), codes)
    for size in case.refused:
        with pytest.raises(ValueError, match="image size"):
            case.backbone.layout(*size)


def check_prompts(case: Case) -> None:
    """Prompts are told apart, and neither a prompt nor its unconditional twin leaves the vocabulary."""
    backbone, layout = case.backbone, case.small
    rows = [backbone.prompt_ids(prompt, layout) for prompt in case.prompts]
    assert rows[0] != rows[1]
    assert backbone.prompt_ids(case.prompts[0], layout) == rows[0]
    for ids in (*rows, *(backbone.unconditional_ids(layout, row) for row in rows)):
        assert ids
        assert min(ids) >= 0
        ids = torch.tensor([ids])
        fed = backbone.embed_prompts(ids, torch.zeros(1, dtype=torch.long))
        assert fed.shape == (1, ids.shape[1], backbone.hidden_size)
    for empty in ("", "  \n"):
        with pytest.raises(ValueError, match="empty prompt"):
            backbone.prompt_ids(empty, layout)


def check_embedding_space(case: Case) -> None:
    """Statistics are of what the trunk sees: normalised codes have mean 0, deviation 1, and come back."""
    backbone = case.backbone
    table = backbone.slot_table()
    assert table.shape == (backbone.num_codes + case.newline, backbone.hidden_size)
    codes = table[: backbone.num_codes].detach()
    space = EmbeddingSpace(codes)
    normalised = space.normalise(codes)
    assert torch.allclose(normalised.mean(0), torch.zeros(()), atol=1e-4)
    assert torch.allclose(normalised.std(0, correction=0), torch.ones(()), atol=1e-3)
    assert torch.allclose(space.denormalise(normalised), codes, atol=1e-5)
    some = torch.arange(0, backbone.num_codes, backbone.num_codes // 7)
    assert torch.equal(space.nearest_ids(normalised[some]), some)


def check_cache(case: Case) -> None:
    """A forward in two parts over the cache is the full one, wherever it is cut; rows start apart."""
    backbone = case.backbone
    rng = torch.Generator().manual_seed(1)
    embeddings = torch.randn(2, 9, backbone.hidden_size, generator=rng)
    columns, first = torch.arange(9).expand(2, -1), torch.tensor([0, 2])
    distances = case.small.distances(5).expand(2, -1, -1) if case.small.axes else None
    positions = position_ids(
        columns.maximum(first[:, None]) - 4, 4 - first, distances, backbone.from_image
    )  # 4 columns of prompts, then slots
    mask = attention_mask(columns, torch.zeros_like(columns), first, 9)
    full = backbone(embeddings, positions, mask)
    for cut in range(3, 9):
        cache = backbone.new_cache(2, 12)
        cache.place(columns[:, :cut], cut)
        parts = [backbone(embeddings[:, :cut], positions[..., :cut], mask[:, :, :cut, :cut], cache)]
        cache.place(columns[:, cut:], 9)
        parts.append(backbone(embeddings[:, cut:], positions[..., cut:], mask[:, :, cut:], cache))
        hidden = torch.cat(parts, dim=1)
        assert torch.allclose(hidden[0], full[0], atol=1e-5)
        assert torch.allclose(hidden[1, 2:], full[1, 2:], atol=1e-5)


def check_timestep_tokens(case: Case) -> None:
    """A timestep token changes the slots of its level and what comes after them, and nothing else."""
    backbone, layout = case.backbone, case.small
    codes = case.codes(layout, batch=1)
    levels = torch.zeros(1, codes[0].numel(), dtype=torch.long)
    levels[0, 1] = 2
    eps = torch.randn(1, codes[0].numel(), backbone.hidden_size, generator=torch.Generator().manual_seed(2))
    noise = NoisyCodes(levels, torch.tensor([0.0, 0.5, 1.0]), eps)
    fed = trunk_input(backbone, [backbone.prompt_ids(case.prompts[0], layout)], codes, layout, noise)
    noisy_column = fed.num_side + fed.prompt_len + int(layout.code_slots[1])

    def hidden(embeddings: Tensor) -> Tensor:
        return backbone(embeddings, fed.position_ids, fed.attention_mask)[0]

    before = hidden(fed.embeddings)
    for side, seen in ((0, False), (1, True)):
        changed = fed.embeddings.clone()
        changed[0, side] += 1
        after = hidden(changed)
        assert torch.equal(after[fed.num_side : noisy_column], before[fed.num_side : noisy_column])
        assert torch.allclose(after[noisy_column:], before[noisy_column:], atol=1e-6) is not seen


def check_loss(case: Case) -> None:
    """With all levels clean the training loss is the plain next-token loss, by transformers' own path."""
    backbone, layout = case.backbone, case.small
    module = SJD2Module(
        backbone, TrainingNoise(enabled=False), OptimizerConfig(), layout.pixels, prompt_dropout=0.0
    )
    batch = Batch(case.prompts, case.codes(layout))
    prompts = [backbone.prompt_ids(prompt, layout) for prompt in case.prompts]
    ours = module.losses(batch, prompts, None).per_token
    clean = NoisyCodes(
        torch.zeros(ours.shape, dtype=torch.long),
        torch.tensor([0.0, 1.0]),
        torch.ones(*ours.shape, backbone.hidden_size),
    )
    assert torch.equal(module.losses(batch, prompts, clean).per_token, ours)
    for row, ids in enumerate(prompts):
        codes = batch.image_ids[row : row + 1]
        logits = case.teacher(ids, codes, layout)
        assert torch.allclose(
            F.cross_entropy(logits, codes.flatten(), reduction="none"), ours[row], atol=1e-4
        )


def check_replay(case: Case) -> None:
    """Autoregression is the slow reference; SJD and SJD2 in replay mode draw the same tokens."""
    backbone, layout = case.backbone, case.small
    sampling = Sampling(guidance_scale=3.0, top_k=2000)
    ties = NearTies()
    baseline = DecodingConfig("ar", window=1, sampling=sampling)
    wanted = decode(backbone, case.prompts, [5, 6], baseline, layout, ties).slot_ids
    ends = [
        min((slot for image, slot in ties.slots if image == row), default=layout.num_slots)
        for row in range(len(case.prompts))
    ]
    slow = decode_reference(backbone, case.prompts[0], 5, sampling, layout)
    assert slow[: ends[0]].tolist() == wanted[0, : ends[0]].tolist()
    for method, levels in (("sjd", 0), ("sjd2", 2)):
        config = DecodingConfig(method, window=5, num_levels=levels, sampling=sampling)
        output = decode(backbone, case.prompts, [5, 6], config, layout)
        for row, end in enumerate(ends):
            assert output.slot_ids[row, :end].tolist() == wanted[row, :end].tolist(), (method, row)


def check_replay_everywhere(case: Case) -> None:
    """Every method that can replay draws autoregression's tokens: any window, levels, batch and guidance."""
    backbone, layout = case.backbone, case.small
    for scale in (1.0, 3.0):
        sampling = Sampling(guidance_scale=scale)
        ties = NearTies()
        wanted = decode(backbone, case.prompts, [5, 6], replace(AR, sampling=sampling), layout, ties).slot_ids
        for number, config in enumerate(replaying_methods()):
            config = replace(config, sampling=sampling)
            rows = [0, 1] if number % 2 else [1]
            output = decode(
                backbone, [case.prompts[row] for row in rows], [5 + row for row in rows], config, layout
            )
            for ours, row in zip(output.slot_ids, rows, strict=True):
                end = min((slot for image, slot in ties.slots if image == row), default=layout.num_slots)
                assert torch.equal(ours[:end], wanted[row, :end]), (config, row)


def replaying_methods() -> list[DecodingConfig]:
    """Each method that replays: with noise over windows and levels, without in one window each."""
    found = []
    for number, method in enumerate(METHODS):
        if method in NOISY:
            grid = [
                (2, 4, "random"),
                (7, 0, "gumbel"),
                (7, 1, "random"),
                (50, 1, "random"),
                (50, 4, "gumbel"),
            ]
        else:
            grid = [((2, 7, 50)[number % 3], 0, ("random", "gumbel")[number % 2])]
        configs = [DecodingConfig(method, window, levels, draft_init=init) for window, levels, init in grid]
        found += [config for config in configs if not config.problems()]
    return found


def check_head(case: Case) -> None:
    """Only the rows of codes are multiplied: nothing as wide as a larger vocabulary is ever made."""
    hidden = torch.randn(2, 3, case.backbone.hidden_size, generator=torch.Generator().manual_seed(4))
    with Operations() as operations:
        logits = case.backbone.image_logits(hidden)
    assert logits.shape == (2, 3, case.backbone.num_codes)
    for name in ("mm", "addmm", "linear"):
        for _, [shape, *_] in operations.named(name):
            assert shape[-1] <= max(case.backbone.num_codes, case.backbone.hidden_size)


def check_sizes(case: Case) -> None:
    """A batch with all sizes that the backbone draws: every row is the image that its prompt gives alone."""
    backbone = case.backbone
    layouts = [backbone.layout(*size) for size in case.sizes]
    prompts = [case.prompts[row % 2] for row in range(2 * len(layouts))]
    layouts, seeds = [*layouts, *layouts[::-1]], list(range(2 * len(layouts)))
    sampling = Sampling(guidance_scale=3.0, top_k=2000)
    for base in (
        AR,
        DecodingConfig("sjd2", 5, num_levels=2),
        DecodingConfig("mc_sjd", 5, acceptance="exact"),
    ):
        config = replace(base, sampling=sampling)
        output = decode(backbone, prompts, seeds, config, layouts)
        for row, layout in enumerate(layouts):
            alone = decode(backbone, prompts[row : row + 1], seeds[row : row + 1], config, layout)
            assert torch.equal(output.image_ids_by_row[row], alone.image_ids[0]), (base.method, row)
            assert backbone.decode_images(alone.image_ids, layout).shape[2:] == layout.pixels


def check_greedy(case: Case) -> None:
    """Greedy tokens are those of transformers' own path, with and without guidance."""
    for scale in (1.0, 3.0):
        config = DecodingConfig("ar", window=1, sampling=Sampling(temperature=0.0, guidance_scale=scale))
        ours = decode(case.backbone, case.prompts[:1], [0], config, case.small).image_ids[0]
        assert torch.equal(ours, case.greedy(case.prompts[0], case.small, scale))


def check_images(case: Case) -> None:
    """Codes become pixels of the layout's size and range, pixels become codes of the vocabulary."""
    backbone = case.backbone
    for size in case.sizes[:2]:
        layout = backbone.layout(*size)
        codes = case.codes(layout)
        images = backbone.decode_images(codes, layout)
        assert images.shape == (2, 3, *size)
        assert to_uint8(images).shape == (2, *size, 3)
        assert torch.allclose(backbone.decode_images(codes[:1], layout), images[:1], atol=1e-4)
        ids = backbone.image_tokenizer.encode(images)
        assert ids.shape == codes.shape
        assert ids.dtype == torch.long
        assert 0 <= ids.min() <= ids.max() < backbone.num_codes
    for wrong in (-1, backbone.num_codes):
        with pytest.raises(ValueError, match="image ids must lie in"):
            backbone.decode_images(torch.full_like(codes, wrong))


def check_modes(case: Case) -> None:
    """In train mode the trunk trains; parts that draw no image from text stay frozen and in eval mode."""
    backbone = case.backbone
    try:
        backbone.train()
        assert backbone.trunk.layers[0].training
        for part in backbone.UNTRAINED:
            module = backbone.model.get_submodule(part)
            assert not any(child.training for child in module.modules())
            assert not any(parameter.requires_grad for parameter in module.parameters())
    finally:
        backbone.eval()
    assert all(parameter.requires_grad for parameter in backbone.trunk.layers.parameters())
    assert not any(module.training for module in backbone.modules())


def check_folder(case: Case) -> None:
    """What was saved loads again: ids, logits, images; another context of guidance can be asked for."""
    backbone, layout = case.backbone, case.small
    with tempfile.TemporaryDirectory() as folder:
        backbone.save(folder)
        again = load_backbone(backbone.FAMILY, folder)
        other = type(backbone.tokens).CONTEXTS[-1]
        assert not list(Path(folder).rglob("*.bin"))
    assert not any(module.training for module in again.modules())
    assert again.tokens == backbone.tokens
    ids = backbone.prompt_ids(case.prompts[0], layout)
    assert again.prompt_ids(case.prompts[0], layout) == ids
    assert again.unconditional_ids(layout, ids) == backbone.unconditional_ids(layout, ids)
    assert (other != backbone.tokens.unconditional) is (len(type(backbone.tokens).CONTEXTS) > 1)
    hidden = torch.randn(2, backbone.hidden_size, generator=torch.Generator().manual_seed(3))
    assert torch.equal(again.image_logits(hidden), backbone.image_logits(hidden))
    assert torch.equal(again.slot_table(), backbone.slot_table())
    codes = case.codes(layout)
    images = [model.decode_images(codes, layout) for model in (again, backbone)]
    assert torch.allclose(*images, atol=2e-2)


CHECKS = [
    check_layouts,
    check_prompts,
    check_embedding_space,
    check_cache,
    check_timestep_tokens,
    check_loss,
    check_replay,
    check_replay_everywhere,
    check_head,
    check_sizes,
    check_greedy,
    check_images,
    check_modes,
    check_folder,
]


def image_token_ids(backbone: Any, image_ids: Tensor, layout: ImageLayout) -> list[int]:
    """Token ids of one image, codes (1, H, W), as the published sequence has them.

    The newline of the last row and the closing tokens stand behind the last code and cannot change the
    image, so training and decoding neither feed nor count them.
    """
    slots = layout.slot_ids(image_ids)[0].to(backbone.slot_token_ids.device)
    return [*backbone.slot_token_ids[slots].tolist(), int(backbone.slot_token_ids[-1]), *backbone._closing]
