"""A sweep decodes and times its baseline once for all of its runs."""

import dataclasses

from sjd2_lightning.decoding.law import Sampling
from sjd2_lightning.evaluation import compare, jobs
from sjd2_lightning.metrics.efficiency import timed
from tests.tools.small_evaluation import METHODS, PROMPTS, evaluate


def test_the_runs_of_a_sweep_decode_the_baseline_once(tmp_path, monkeypatch):
    """Another method, the same baseline: its images and times are those of the first run."""
    decoded = []
    monkeypatch.setattr(
        jobs, "timed", lambda call, device: decoded.append(call.args[2].method) or timed(call, device)
    )
    two = {name: METHODS[name] for name in ("ar", "sjd")}
    first = evaluate(tmp_path / "0", methods=two)
    assert "ar" in decoded
    decoded.clear()
    others = [tmp_path / "missing", tmp_path / "0"]
    again = {"ar": METHODS["ar"], "sjd2": METHODS["sjd2"]}
    second = evaluate(tmp_path / "1", methods=again, baseline_from=others)
    assert set(decoded) == {"sjd2"}
    assert second.methods["ar"].records == first.methods["ar"].records
    assert second.methods["sjd2"].measured["speedup"].flags == ()
    assert second.methods["sjd2"].equal_to_ar == 1
    assert (tmp_path / "1" / "images" / "ar" / "p0.png").is_file()
    # another baseline, other prompts, or another process's images are not taken
    warm = dataclasses.replace(METHODS["ar"], sampling=Sampling(temperature=0.5))
    decoded.clear()
    evaluate(
        tmp_path / "2",
        methods={"ar": warm, "sjd": dataclasses.replace(METHODS["sjd"], sampling=warm.sampling)},
        baseline_from=others,
    )
    evaluate(tmp_path / "3", methods=two, prompts=PROMPTS[:3], baseline_from=others)
    monkeypatch.setattr(compare, "_decoded_here", set())
    evaluate(tmp_path / "4", methods=two, baseline_from=others)
    assert decoded.count("ar") == 3 + 2 + 3  # batches of two prompts
