"""The law of whole images by enumeration, without the package's sampling code, and chi-square against it."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from scipy.stats import chi2

from sjd2_lightning.decoding import Sampling
from sjd2_lightning.models.backbone import Backbone, ImageLayout
from sjd2_lightning.models.chameleon import ChameleonBackbone
from tests.tools.tiny_backbones import TableBackbone


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def slot_scale(sampling: Sampling, slot: int, num_slots: int) -> float:
    """Guidance scale of one slot."""
    if sampling.guidance_schedule == "linear":
        return 1 + (sampling.guidance_scale - 1) * slot / (num_slots - 1)
    if sampling.guidance_schedule == "interval":
        inside = sampling.guidance_start <= slot / num_slots < sampling.guidance_end
        return sampling.guidance_scale if inside else 1.0
    return sampling.guidance_scale


def code_law(
    conditional: np.ndarray, unconditional: np.ndarray, sampling: Sampling, scale: np.ndarray | float
) -> np.ndarray:
    """Law (M, K) of logits (M, K): guidance, temperature, top-k, top-p, softmax, row by row in float64.

    The guidance scale is one number or (M, 1).
    """
    scores = ((1 - scale) * unconditional + scale * conditional) / sampling.temperature
    for row in scores:
        order = np.argsort(-row, kind="stable")
        kept = len(row) if sampling.top_k == 0 else min(sampling.top_k, len(row))
        mass = np.cumsum(_softmax(np.where(np.isin(np.arange(len(row)), order[:kept]), row, -np.inf))[order])
        if sampling.top_p < 1:
            kept = min(kept, int(np.searchsorted(mass, sampling.top_p)) + 1)
        row[order[kept:]] = -np.inf
    return _softmax(scores)


def _table_logits(backbone: TableBackbone, context: str | None, codes: np.ndarray, width: int) -> np.ndarray:
    """Logits (M, K) of the code behind the given ones (M, j), straight from the table."""
    num_codes = backbone.num_codes
    number = 0 if context is None else sum(int(word[1:]) for word in context.split())
    tokens = np.full((len(codes), 2), num_codes + 1)
    for place in range(codes.shape[1]):
        tokens = np.column_stack([tokens, codes[:, place]])
        if (place + 1) % width == 0:
            tokens = np.column_stack([tokens, np.full(len(codes), num_codes)])
    return backbone.table.double().numpy()[number, tokens[:, -2], tokens[:, -1]]


def _trunk_logits(
    backbone: ChameleonBackbone, context: str | None, codes: np.ndarray, layout: ImageLayout
) -> np.ndarray:
    """Logits (M, K) by transformers' own causal forward over token ids: no mask, cache or batch of ours."""
    tokens, config = backbone.tokens, backbone.model.config.vocabulary_map
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    ids = [config[f"IMGIMG{str(code).translate(letters)}Z"] for code in range(backbone.num_codes)]
    size = [tokens.size_base + pixels // tokens.size_unit for pixels in layout.pixels]
    prefix = [tokens.boi, *size]
    if context is not None:
        prefix = [tokens.bos, *backbone.text_tokenizer.encode(context), tokens.separator, *prefix]
    rows = []
    for row in codes:
        row_ids = list(prefix)
        for place, code in enumerate(row):
            row_ids.append(ids[code])
            if (place + 1) % layout.width == 0:
                row_ids.append(tokens.newline)
        rows.append(row_ids)
    with torch.no_grad():
        hidden = backbone.model.model(input_ids=torch.tensor(rows), use_cache=False).last_hidden_state[:, -1]
        return backbone.model.lm_head(hidden)[:, ids].double().numpy()


def sequence_law(backbone: Backbone, prompt: str, layout: ImageLayout, sampling: Sampling) -> np.ndarray:
    """Probability (K^n,) of every image, n codes each, the first code the most significant digit."""
    num_codes, length = backbone.num_codes, layout.height * layout.width
    law = np.ones(1)
    for place in range(length):
        prefixes = list(itertools.product(range(num_codes), repeat=place))
        codes = np.array(prefixes, dtype=int).reshape(num_codes**place, place)
        sides = []
        for context in (prompt, None):
            if isinstance(backbone, TableBackbone):
                sides.append(_table_logits(backbone, context, codes, layout.width))
            else:
                sides.append(_trunk_logits(backbone, context, codes, layout))
        scale = slot_scale(sampling, int(layout.code_slots[place]), layout.num_slots)
        law = (law[:, None] * code_law(*sides, sampling, scale)).ravel()
    return law


def histogram(image_ids: torch.Tensor, num_codes: int) -> np.ndarray:
    """How often each of the K^n images (B, H, W) occurs."""
    flat = image_ids.flatten(1).numpy()
    numbers = flat @ num_codes ** np.arange(flat.shape[1])[::-1]
    return np.bincount(numbers, minlength=num_codes ** flat.shape[1])


def chi_square(counts: np.ndarray, law: np.ndarray, min_expected: float = 8.0) -> tuple[float, int]:
    """Statistic and degrees of freedom of counts under a law; rare cells are pooled.

    A count in a cell of mass zero gives an infinite statistic.
    """
    expected = counts.sum() * law
    if counts[expected < 1e-9].any():
        return np.inf, 1
    rare = expected < min_expected
    observed, wanted = counts[~rare], expected[~rare]
    if expected[rare].sum() >= min_expected:
        observed, wanted = np.append(observed, counts[rare].sum()), np.append(wanted, expected[rare].sum())
    elif rare.any():  # too few even together: they join the smallest cell
        smallest = wanted.argmin()
        observed[smallest] += counts[rare].sum()
        wanted[smallest] += expected[rare].sum()
    return float(((observed - wanted) ** 2 / wanted).sum()), len(wanted) - 1


def p_value(statistics: list[tuple[float, int]]) -> float:
    """p-value of independent chi-square statistics, taken together."""
    return float(chi2.sf(sum(value for value, _ in statistics), sum(dof for _, dof in statistics)))
