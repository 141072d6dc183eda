"""One self-contained HTML page of an evaluation: no network, light and dark, from phone to wide screen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sjd2_lightning.decoding.config import BASELINE
from sjd2_lightning.evaluation.results import EvaluationResult, MethodResult
from sjd2_lightning.report.cost import method_costs
from sjd2_lightning.report.figures import cost_chart, heat_map_png, settling_curve, settling_map
from sjd2_lightning.report.html import (
    data_uri,
    embedded_image,
    embedded_pixels,
    figure_svg,
    method_colour,
    render,
)
from sjd2_lightning.report.likeness import best_known, has_real_pictures
from sjd2_lightning.report.observe import Observations, Replay, Trajectory, settling, sprite
from sjd2_lightning.report.plain_ground import PLAIN_NOTE, THIRDS, by_plain_ground, plain_cells
from sjd2_lightning.report.table import (
    columns,
    control_notes,
    headline,
    headline_missing,
    judge_columns,
    judge_rows,
    rows,
)

_NUM_OPEN = 8  # prompts whose images are seen before anybody asks for more
_LEVELS = "0123456789abcdefghijklmnopqrstuvwxyz"


def html_page(
    result: EvaluationResult,
    provenance: Mapping[str, Any],
    observations: Observations | None = None,
    *,
    title: str = "Decoding methods",
    num_prompts: int = 24,
    max_megabytes: float = 12.0,
) -> str:
    """The page as text.

    Args:
        result: result of `evaluate_methods`.
        provenance: result of `collect_provenance`.
        observations: result of `observe`; without it the page has neither replay nor settling.
        title: title of the page.
        num_prompts: prompts whose images are shown; the table covers all prompts.
        max_megabytes: room for images. Replays come first; then prompts, at least one, while there is room.
    """
    seen = observations or Observations()
    places = {name: place for place, name in enumerate(result.methods)}
    replays = _replays(result, seen.replays)
    room = 1e6 * max_megabytes - sum(len(entry["sprite"]) for shown in replays for entry in shown["methods"])
    shown = _prompts(result, num_prompts, room)
    has_real = has_real_pictures(result)
    costs = method_costs(result)
    return render(
        "page.html",
        title=title,
        headline=headline(result),
        headline_missing=headline_missing(result),
        has_real=int(has_real),
        num_open=_NUM_OPEN,
        order_note=" Those most like their real pictures come first." if has_real else "",
        places=places,
        columns=columns(result),
        rows=rows(result),
        warnings=result.warnings,
        control_notes=control_notes(result),
        judge_columns=judge_columns(result),
        judge_rows=judge_rows(result),
        prompts=shown,
        num_prompts=len(result.prompts),
        replays=replays,
        settling=settling(seen.trajectories),
        settling_curve=_settling_curve(seen.trajectories, places),
        settling_maps=_settling_maps(seen.trajectories, places),
        costs=costs,
        cost_chart=figure_svg(
            cost_chart(seen.pass_costs, costs, places, legend=False), "cost", "Milliseconds a pass by window"
        ),
        pass_costs=seen.pass_costs,
        thirds=THIRDS,
        plain_note=PLAIN_NOTE,
        plain_rows=[(name, plain_cells(thirds)) for name, thirds in by_plain_ground(result).items()],
        histograms=[_bars(method) for method in result.methods.values()],
        reference_name=result.reference_name,
        protocols=_protocols(result),
        summary=_summary(provenance),
        provenance=json.dumps(dict(provenance), indent=2, ensure_ascii=False),
        data={
            "methods": list(places),
            "prompts": [_script_data(prompt) for prompt in shown],
            "replays": replays,
        },
    )


def prompts_page(result: EvaluationResult, num_prompts: int = 100, max_megabytes: float = 12.0) -> str:
    """A page of the prompts alone, with each method's image, passes and score; limits as `html_page`'s."""
    shown = _prompts(result, num_prompts, 1e6 * max_megabytes)
    return render("prompts.html", "Prompts", methods=list(result.methods), prompts=shown)


def _prompts(result: EvaluationResult, num_prompts: int, room: float) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for place in best_known(result)[:num_prompts]:
        item = result.prompts[place]
        real = result.real_image(item.key)
        images = [_image(result, method, place) for method in result.methods.values()]
        picture = "" if real is None else embedded_pixels(real.numpy())
        room -= len(picture) + sum(len(image["picture"]) + len(image["map"]) for image in images)
        if room < 0 and found:
            break
        records = [method.records[place] for method in result.methods.values()]
        equal = [[a.percent_equal(b) for b in records] for a in records]
        found.append(
            {
                "caption": item.prompt,
                "key": item.key,
                "seed": item.seed,
                "images": images,
                "equal": equal,
                "real": picture,
            }
        )
    return found


def _image(result: EvaluationResult, method: MethodResult, place: int) -> dict[str, Any]:
    baseline, record = result.methods.get(BASELINE), method.records[place]
    verdict = method.verdicts[place] if method.verdicts else None
    return {
        "method": method.name,
        "nfe": record.nfe,
        "compression": round(record.num_generated / record.nfe, 2),
        "clip": round(method.clip_scores[place], 1) if method.clip_scores else None,
        "same": baseline is not None
        and method is not baseline
        and record.percent_equal(baseline.records[place]) == 100,
        "judge": None if verdict is None else verdict.sentence,
        "right": verdict is not None and verdict.right,
        "picture": embedded_image(result.store.image_path(record)),
        "map": data_uri(heat_map_png(record)),
    }


def _script_data(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """What the script needs of a prompt; it takes the images from the page."""
    images = [
        {name: image[name] for name in ("nfe", "compression", "clip", "judge", "same")}
        for image in prompt["images"]
    ]
    return {"caption": prompt["caption"], "seed": prompt["seed"], "images": images, "equal": prompt["equal"]}


def _replays(result: EvaluationResult, replays: Sequence[Replay]) -> list[dict[str, Any]]:
    """One replay for each prompt, with an entry for each method."""
    costs = {cost.method: cost.seconds for cost in method_costs(result)}
    found: dict[str, dict[str, Any]] = {}
    for replay in replays:
        trajectory = replay.trajectory
        entry = found.setdefault(
            trajectory.item.key,
            {"caption": trajectory.item.prompt, "size": list(trajectory.size), "methods": []},
        )
        sheet, in_row = sprite(replay)
        seen = trajectory.num_seen
        entry["methods"].append(
            {
                "name": trajectory.method,
                "passes": trajectory.num_passes,
                "seconds": costs[trajectory.method],
                "committed": trajectory.num_committed.tolist(),
                "seen": seen.tolist(),
                "frames": list(replay.passes),
                "levels": [_levels(trajectory, place) for place in replay.passes],
                "frame_size": [replay.frames.shape[2], replay.frames.shape[1]],
                "in_row": in_row,
                "sprite": data_uri(sheet, "webp"),
            }
        )
    return list(found.values())


def _levels(trajectory: Trajectory, place: int) -> str:
    """One character for each draft that stays in the window after a pass: the level it was fed with."""
    drafts = trajectory.levels[place, trajectory.num_committed[place] : trajectory.num_seen[place]]
    return "".join(_LEVELS[min(level, len(_LEVELS) - 1)] for level in drafts.tolist())


def _settling_curve(trajectories: Sequence[Trajectory], places: Mapping[str, int]) -> str:
    if not trajectories:
        return ""
    figure = settling_curve(settling(trajectories), places, legend=False)
    return figure_svg(figure, "curve", "Share of tokens already final, by passes before the commit")


def _settling_maps(trajectories: Sequence[Trajectory], places: Mapping[str, int]) -> list[dict[str, Any]]:
    """Settling maps of the first prompt, one for each method that drafts."""
    return [
        {
            "method": trajectory.method,
            "caption": trajectory.item.prompt,
            "svg": figure_svg(
                settling_map(trajectory, method_colour(places[trajectory.method])),
                f"map-{places[trajectory.method]}",
                f"Passes in which {trajectory.method} settled and committed each token",
            ),
        }
        for trajectory in trajectories
        if trajectory.item == trajectories[0].item and trajectory.method != BASELINE
    ]


def _bars(method: MethodResult) -> dict[str, Any]:
    """Bars of the acceptance histogram, drawn by the page."""
    counts = method.acceptance_counts
    total, most = max(sum(counts), 1), max(counts, default=1) or 1
    bars = [
        {"slots": n, "share": count / total, "height": 100 * count / most}
        for n, count in enumerate(counts)
        if n
    ]
    mean = method.measured["step_compression"].value
    return {"method": method.name, "mean": mean, "bars": bars, "most": most / total}


def _protocols(result: EvaluationResult) -> list[tuple[str, str]]:
    found = {
        measure.name: measure.protocol
        for method in result.methods.values()
        for measure in method.measured.values()
    }
    return list(found.items())


def _summary(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    git, hardware = provenance.get("git", {}), provenance.get("hardware", {})
    versions, seeds = provenance.get("versions", {}), provenance.get("seeds", {})
    commit = git.get("commit") or "not a git checkout"
    rounded = f", quantised to {provenance['quantized']}" if provenance.get("quantized") else ""
    return [
        ("made", str(provenance.get("created"))),
        ("code", f"{commit[:12]}{' with local changes' if git.get('dirty') else ''}"),
        (
            "weights",
            f"{provenance.get('weights', '')} {str(provenance.get('weights_hash'))[:21]}{rounded}".strip(),
        ),
        ("hardware", f"{hardware.get('gpu') or hardware.get('cpu')}, {hardware.get('num_threads')} threads"),
        ("software", f"Python {versions.get('python')}, torch {versions.get('torch')}"),
        ("seeds", f"{len(seeds)}, one a prompt, the same for every method"),
    ]
