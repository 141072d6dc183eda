"""Episodes of a world under policies by several decoding methods: the shared comparison, with success.

Every batch of episodes is acted by every method, in an order that rotates with the batch, as `jobs` does with
images. Timing covers the decoding of chunks, prefill included, and not the world.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from sjd2_lightning import __version__
from sjd2_lightning.data.sources.pick_place import (
    NUM_ACTIONS,
    PickAndPlace,
    actions_of,
    observation_text,
    to_bins,
)
from sjd2_lightning.decoding.config import BASELINE
from sjd2_lightning.decoding.loop import decode
from sjd2_lightning.decoding.output import DecodeOutput
from sjd2_lightning.evaluation.jobs import process_name, unfinished_batches
from sjd2_lightning.evaluation.policy_methods import PolicyMethod
from sjd2_lightning.evaluation.prompts import PromptItem, check_prompts, seed_of
from sjd2_lightning.evaluation.results import EvaluationResult, MethodResult
from sjd2_lightning.evaluation.store import Record, RecordStore, discard_other_run, method_fields
from sjd2_lightning.metrics.bootstrap import MetricResult, mean_result, paired_difference, share_result
from sjd2_lightning.metrics.efficiency import timed
from sjd2_lightning.models.policy import ActionPolicy
from sjd2_lightning.run.files import sha256_of_json
from sjd2_lightning.run.provenance import weights_hash
from sjd2_lightning.run.stages import stage

_SIDE = 128  # of the picture of an episode, in pixels
_TABLE, _HAND, _CUBE, _GOAL = (245, 243, 238), (40, 90, 160), (200, 60, 40), (60, 150, 70)


@dataclass(frozen=True, kw_only=True)
class EpisodeRecord(Record):
    """One episode: passes of all chunks, and the size and settling map of the first.

    Attributes:
        success: whether the cube lay on the goal at the end, let go.
        codes: the codes of all chunks, one behind another.
        equal: leading share of the chunks, in percent, that plain decoding by the same weights draws, never
            rounded up to all; observations part ways behind the first one that differs.
        chunk_passes: passes of each chunk.
        chunk_seconds: wall clock of each chunk's batch.
    """

    success: bool
    codes: tuple[int, ...]
    equal: int
    chunk_passes: tuple[int, ...]
    chunk_seconds: tuple[float, ...]

    SAME: ClassVar[str] = "token for token to plain decoding by the same weights"

    def percent_equal(self, other: EpisodeRecord) -> int:
        """Against plain decoding by the own weights, whichever the other's are."""
        return self.equal


class Acted(NamedTuple):
    """A batch of B episodes by one method.

    Attributes:
        outputs: what each look drew.
        seconds: wall clock of each look.
        path: (looks * A + 1, B, 3) places of the hand.
        world: the world at the end.
    """

    outputs: list[DecodeOutput]
    seconds: list[float]
    path: NDArray[Any]
    world: PickAndPlace

    @property
    def codes(self) -> Tensor:
        """(looks, B, N) codes of the chunks."""
        return torch.stack([output.slot_ids.cpu() for output in self.outputs])


def episode_prompts(num: int, seed: int) -> list[PromptItem]:
    """Held-out episodes: a seed decides where things lie, and with the look the first drafts."""
    keys = [f"episode-{number:05d}" for number in range(num)]
    return [PromptItem(key, f"pick and place {key[-5:]}", seed_of(key, seed)) for key in keys]


def act(
    policy: ActionPolicy, method: PolicyMethod, episodes: Sequence[PromptItem], num_actions: int = NUM_ACTIONS
) -> Acted:
    """Looks, draws a chunk, takes all its actions, and looks again, until so many actions are taken."""
    sizes, layout = policy.sizes, policy.chunk
    seeds = [item.seed for item in episodes]
    world = PickAndPlace()
    seen, _ = world.reset(seeds)
    outputs, seconds, path = [], [], [world.state.hand]
    for look in range(-(-num_actions // sizes.num_steps)):
        texts = [observation_text(numbers) for numbers in to_bins(seen, sizes.num_bins)]
        looks = [seed + look for seed in seeds]
        output, taken = timed(
            lambda texts=texts, looks=looks: decode(policy, texts, looks, method.decoding, layout),  # type: ignore[misc]
            policy.device,
        )
        outputs.append(output)
        seconds.append(taken)
        for actions in actions_of(output.image_ids.cpu().numpy(), sizes.num_bins).transpose(1, 0, 2):
            seen, *_ = world.step(actions)
            path.append(world.state.hand)
    return Acted(outputs, seconds, np.stack(path), world)


def act_methods(
    policies: Mapping[str, ActionPolicy],
    methods: Mapping[str, PolicyMethod],
    episodes: Sequence[PromptItem],
    out_dir: str | Path,
    *,
    batch_size: int = 1,
    replace_other: bool = False,
) -> RecordStore:
    """Acts all episodes by all methods; a killed run continues with the batch that it was at.

    Args:
        policies: policies by name, in eval mode.
        methods: methods by name; with plain decoding of every policy.
        episodes: episodes with their seeds.
        out_dir: folder of records and pictures.
        batch_size: episodes acted together.
        replace_other: remove records of another configuration, instead of raising.

    Raises:
        ValueError: a policy without plain decoding, or a folder of another configuration.
    """
    check_prompts(episodes)
    plain = {method.policy: name for name, method in methods.items() if method.decoding.method == BASELINE}
    if missing := sorted({method.policy for method in methods.values()} - set(plain)):
        raise ValueError(
            f"compare: needs {BASELINE}, which all methods of {', '.join(missing)} are held against"
        )
    identity = {
        "code": __version__,
        "weights": {name: weights_hash(policy) for name, policy in policies.items()},
        "device": str(next(iter(policies.values())).device.type),
        "methods": {
            name: {"policy": method.policy} | method_fields(method.decoding)
            for name, method in methods.items()
        },
        "prompts": sha256_of_json([item.identity for item in episodes]),
        "batch_size": batch_size,
    }
    if replace_other:
        discard_other_run(out_dir, identity)
    store = RecordStore(out_dir, identity, kind=EpisodeRecord)
    is_warm = False
    doing = "acting", "episodes"
    for number, batch, order in unfinished_batches(episodes, list(methods), batch_size, store, doing):
        if not is_warm:  # the first call of a shape is slower
            with stage("warming up"):
                is_warm = all(act(policies[m.policy], m, batch, 1) for m in methods.values())
        found = {name: act(policies[methods[name].policy], methods[name], batch) for name in order}
        for name, acted in found.items():
            own = found[plain[methods[name].policy]].codes
            records = _records(name, number, batch, acted, own)
            store.append(records, [_picture(acted, row) for row in range(len(batch))])
    return store


def with_success(result: EvaluationResult) -> EvaluationResult:
    """The result with success in every row, and the 95th percentile of seconds of single chunks."""
    plain = result.methods.get(BASELINE)
    return replace(
        result, methods={name: _with_success(method, plain) for name, method in result.methods.items()}
    )


def _with_success(method: MethodResult, plain: MethodResult | None) -> MethodResult:
    rows: list[Any] = list(method.records)
    protocol = "share of episodes with the cube on the goal at their end; Wilson's interval"
    share = share_result("success", [row.success for row in rows], protocol)
    measured = method.measured | {"success": share}
    measured["chunk_passes"] = mean_result(
        "chunk_passes",
        [np.mean(row.chunk_passes) for row in rows],
        "forward passes a chunk, prefill excluded",
    )
    if plain is not None and plain is not method:
        theirs: list[Any] = list(plain.records)
        measured["success_minus_ar"] = paired_difference(
            "success_minus_ar",
            [float(row.success) for row in rows],
            [float(row.success) for row in theirs],
            "paired by episode",
        )
    seconds = [taken / row.batch_size for row in rows for taken in row.chunk_seconds]
    slowest = float(np.quantile(seconds, 0.95))
    measured["chunk_ms_p95"] = MetricResult(
        "chunk_ms_p95",
        1000 * slowest,
        None,
        len(rows),
        "wall clock of a batch / chunks in it, 95th percentile",
    )
    return replace(method, measured=measured, seconds_p95=slowest)


def _records(
    name: str, number: int, batch: Sequence[PromptItem], acted: Acted, plain: Tensor
) -> list[EpisodeRecord]:
    """Records of one batch by one method; `plain` (looks, B, N) are the codes of plain decoding."""
    codes, stats = acted.codes, [output.stats for output in acted.outputs]
    same = (codes == plain).all(-1).cumprod(0).sum(0)  # (B,) leading chunks
    layout, solved = acted.outputs[0].layouts[0], acted.world.state.solved
    return [
        EpisodeRecord(
            key=item.key,
            prompt=item.prompt,
            seed=item.seed,
            method=name,
            batch=number,
            batch_size=len(batch),
            nfe=sum(int(own.nfe[row]) for own in stats),
            num_generated=sum(int(own.num_generated[row]) for own in stats),
            accepted=tuple(count for own in stats for count in own.accepted[row]),
            settled_iteration=tuple(stats[0].settled_iteration[row].tolist()),
            size=layout.grid,
            seconds=sum(acted.seconds),
            process=process_name(os.getpid()),
            success=bool(solved[row]),
            codes=tuple(codes[:, row].flatten().tolist()),
            equal=100 * int(same[row]) // len(codes),
            chunk_passes=tuple(int(own.nfe[row]) for own in stats),
            chunk_seconds=tuple(acted.seconds),
        )
        for row, item in enumerate(batch)
    ]


def _picture(acted: Acted, row: int) -> NDArray[np.uint8]:
    """The table from above (128, 128, 3): the way of the hand, goal, and where the cube lies at the end."""
    picture = Image.new("RGB", (_SIDE, _SIDE), _TABLE)
    pen, state = ImageDraw.Draw(picture), acted.world.state
    way = [tuple(place) for place in (_SIDE * acted.path[:, row, :2]).tolist()]
    x, y = (_SIDE * state.goal[row]).tolist()
    pen.ellipse((x - 6, y - 6, x + 6, y + 6), outline=_GOAL, width=2)
    pen.line(way, fill=_HAND, width=1)
    x, y = (_SIDE * state.cube[row, :2]).tolist()
    pen.rectangle((x - 3, y - 3, x + 3, y + 3), fill=_CUBE)
    return np.array(picture)
