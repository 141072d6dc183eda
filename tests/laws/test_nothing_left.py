"""What is refused, and what is only planned, leaves no folder: alone, and in a sweep."""

import csv

from sjd2_lightning.cli.evaluate import main as evaluate_main
from sjd2_lightning.cli.train import main as train_main
from sjd2_lightning.run.owner import owned


def test_a_sweep_that_is_refused_throughout_leaves_nothing(command, tmp_path, capsys):
    words = ("-m", "decoding.window=0,-1", "run_dir=outputs/sweep", "logger=none")
    assert command(evaluate_main, *words) == 1
    assert "failed: decoding.window=0 (outputs/sweep/0): " in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_plans_leave_nothing_alone_or_in_a_sweep(command, tmp_path, capsys):
    assert command(train_main, "-m", "trainer.precision=32-true,bf16-mixed", "print_plan=true") == 0
    assert capsys.readouterr().out.count("bf16-mixed") >= 1
    for words in (["model=simple_ar"], ["-m", "model=simple_ar", "batch_size=1,4"]):
        assert command(evaluate_main, *words, "print_plan=true") == 0
        assert "tokens an image: 4,096" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_sweep_leaves_folders_of_others_as_they_are_and_none_of_what_it_refused(
    command, tiny_folder, tmp_path
):
    """Of three runs one is another process's, one is refused, and one is told apart from both."""
    mine = ["run_dir=sweep", "metrics=none", "num_prompts=1", "warm_up=false", "compare=[sjd]", "logger=none"]
    words = ["-m", "decoding.window=4,0,16", f"model.path={tiny_folder / 'model'}", *mine]
    with owned(tmp_path / "sweep" / "0", "evaluate"):
        assert command(evaluate_main, *words) == 0
        assert not (tmp_path / "sweep" / "0" / "job.json").exists()
    assert {path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir()} - {"figures"} <= {"0", "2"}
    lines = {line["job"]: line for line in csv.DictReader((tmp_path / "sweep/sweep.csv").open())}
    assert "runs here already" in lines["0"]["error"]
    assert "decoding.window" in lines["1"]["error"]
    assert not lines["2"]["error"]


def test_a_refusal_inside_a_job_is_one_line_and_leaves_nothing(command, tmp_path, capfd):
    (tmp_path / "model").mkdir()
    status = command(evaluate_main, f"weights={tmp_path / 'model'}", "run_dir=run", "logger=none")
    assert status == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len([line for line in lines if "model" in line]) == 1
    assert not any("Error executing job" in line for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
