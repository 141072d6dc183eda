"""Every command of the package in one table: `sjd2 COMMAND`, or `python -m sjd2_lightning COMMAND`."""

from __future__ import annotations

import difflib
import importlib
import json
import os
import sys

from sjd2_lightning import __version__
from sjd2_lightning.run.processes import HANDED_DOWN, started_by_lightning
from sjd2_lightning.run.stages import speak, stage

# command: (module whose `main` runs it, what it does)
COMMANDS = {
    "generate": ("cli.generate", 'draw pictures: sjd2 generate "red heart" -n 4 --compare ar'),
    "train": ("cli.train", "fine-tune: sjd2 train data=shards data.data_dir=data/photos"),
    "evaluate": ("cli.evaluate", "compare methods: sjd2 evaluate compare=[ar,sjd2] num_prompts=8"),
    "play": ("cli.play", "type a prompt and watch it, in a browser: sjd2 play"),
    "prepare": ("cli.prepare", "make shards of your pictures: sjd2 prepare folder --input photos"),
    "convert": ("models.convert", "bring a released Lumina-mGPT or LlamaGen in shape"),
    "pairs": ("cli.pairs", "count which codes stand side by side: methods.sjd2.pairs.table"),
    "corrector": ("cli.correct", "train what corrects drafts: methods.sjd2.corrector.weights"),
    "drafter": ("cli.draft", "train what guesses new slots: methods.sjd2.drafter.weights"),
    "teacher": ("cli.teacher", "let a model draw the images of a data set, for distillation"),
    "doctor": ("cli.doctor", "what this machine can do, which models are ready: sjd2 doctor"),
    "publish": ("cli.publish", "share tuned weights on the hub, with a card made from a report"),
    "wandb": ("report.wandb_report", "publish a finished evaluation as a W&B Report"),
}


def main(arguments: list[str] | None = None) -> None:
    """Runs the command that the first argument names; the others are its own.

    Args:
        arguments: words of the command line behind the program's name; None reads `sys.argv`.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if started_by_lightning():
        # Lightning started this process and repeats the command line without the command
        words = [json.loads(os.environ[HANDED_DOWN])["script"], *words]
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if words[0] == "--version":
        print(__version__)
        return
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean `sjd2 {close[0]}`?" if close else f"commands: {', '.join(COMMANDS)}"
        print(f"sjd2: there is no command {name!r}; {hint}", file=sys.stderr)
        sys.exit(2)
    place = f"sjd2_lightning.{COMMANDS[name][0]}"
    if name in ("train", "evaluate"):  # Hydra reads its overrides from the command line itself
        sys.argv[1:] = rest
        importlib.import_module(place).main()
        return
    speak()
    with stage("loading libraries"):
        module = importlib.import_module(place)
    module.main(rest)


def usage() -> str:
    """The table of commands."""
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {purpose}" for name, (_, purpose) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: sjd2 COMMAND ...",
            "",
            *rows,
            "",
            "Each explains itself, with examples: sjd2 train --help. Keys are given as",
            "KEY=VALUE; sjd2 train --cfg job --resolve shows all that would run.",
            "",
            "Three first commands:",
            '  sjd2 generate "red heart" -n 4 --compare ar',
            "  sjd2 train experiment=smoke",
            "  sjd2 evaluate experiment=smoke",
        ]
    )


if __name__ == "__main__":
    main()
