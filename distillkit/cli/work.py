"""What the steps of a distillation have in common: one piece of work, its settings, and which of them are flags of which step.

All steps of one piece of work are described by one :class:`Work`, and live in one folder, ``runs/NAME``: the settings that
replay it, experts, checkpoint, the set, its text, and every score.  So a whole experiment is::

    python -m distillkit distil --name first --corpus ag_news --student bert-base-uncased
    python -m distillkit evaluate --name first
    python -m distillkit card --name first

Settings come from flags, else from ``--config FILE.yaml``, else from what the folder was made with, else are defaults.
This module builds the parser, so it imports nothing heavy; the steps themselves are in :mod:`distillkit.cli.steps`.
"""

from __future__ import annotations

import argparse
import typing
from typing import Literal

from distillkit.experiments.settings import (
    Data,
    Expert,
    Inner,
    Outer,
    Seeds,
    SetSeed,
    Size,
    Target,
    flag,
    names,
    option,
    read,
    settings,
    whole,
)

SETTINGS = "settings.yaml"


@settings(name="work", corpus="docstrings", student="offline:minilm")
class Work(Data, Size, Expert, Inner, Outer, Target, SetSeed):
    """Settings of one piece of work; each is a flag of some step."""

    objective: Literal["bptt", "trajectory"] = option("bptt", "bptt, or trajectory, for which experts must be recorded first")
    optimizer: Literal["sgd", "momentum", "adamw"] = option("sgd", "optimiser of the inner loop: sgd, momentum or adamw")
    inits: int = whole(1, "initialisations, or expert segments, averaged in an outer step")
    checkpoint_every: int = whole(10, "outer steps between checkpoints")
    set: str | None = option(None, "folder or hub:owner/name of the set (default: that of --name)")
    recipe: Literal["own", "standard", "tuned"] | None = option(
        None, "own, standard or tuned (default: own if the set has one, else tuned)")
    seeds: Seeds = option((0, 1, 2), "fresh models that each score is the mean of")
    split: Literal["test", "validation"] = option("test", "split that scores are taken on: test or validation")
    license: str | None = option(None, "licence of the set, as the hub writes it, such as cc-by-4.0")
    corpus_license: str | None = option(None, "licence of the corpus, in words")


class Step(typing.NamedTuple):
    """What the parser knows of a step: its help in a line, the settings that are its flags, and examples."""

    help: str
    flags: tuple[str, ...]
    example: str


WHERE = ("name", *names(Data))
SCORED = ("set", "recipe", "seeds", "split")
STEPS = {
    "experts": Step(
        "train on all the data and record the path of the weights, which distil --objective trajectory matches",
        (*WHERE, *(name for name in names(Expert) if name != "match_epochs"), "seed"),
        "experts --name first --corpus docstrings --expert-epochs 2 --expert-count 2"),
    "distil": Step(
        "learn a set: embeddings into runs/NAME/set, their nearest words into runs/NAME/text",
        (*WHERE, *names(Size, Inner, Outer), "objective", "optimizer", "inits", "checkpoint_every", "match_epochs", "seed"),
        "distil --name first --corpus docstrings --outer-steps 100\n"
        "  torchrun --nproc-per-node 2 -m distillkit distil --name first --inits 4   (two processes, two each)\n"
        "  the same command goes on where an interrupted run stopped; runs/first/settings.yaml replays it"),
    "evaluate": Step(
        "train fresh models on a set, score them on held-out real text; adds a line to runs/NAME/scores.jsonl",
        (*WHERE, *SCORED),
        "evaluate --name first                       the set of that name, under its own recipe\n"
        "  python -m distillkit evaluate --name first --set runs/first/text --recipe tuned"),
    "transfer": Step(
        "score a set's text on another model, which reads it with its own tokenizer",
        (*WHERE, *SCORED, "target"),
        "transfer --name first --target offline:distil-minilm"),
    "card": Step(
        "print a set's dataset card, with the scores of runs/NAME/scores.jsonl that are this set's; or publish it",
        (*WHERE, "set", "license", "corpus_license"),
        "card --name first --out runs/first/published\n"
        "  python -m distillkit card --name first --set runs/first/text --push me/six-sentences   (private)"),
}
EPILOG = """example:
  python -m distillkit {example}

All settings may stand in a YAML file (--config), as in 'outer_steps: 100'; flags win over it. Without --config a step
uses the settings that runs/NAME was distilled with. Exit codes: 0 done, 2 something is wrong with what was asked;
130 interrupted, 143 and 129 ended by SIGTERM and SIGHUP (give the same command again to go on)."""
# Step → {argument of the library: the setting that it comes from, or what to say instead}, for errors of the library.
ARGUMENTS = {
    "experts": {"count": "expert_count", "epochs": "expert_epochs", "batch_size": "expert_batch",
                "step_size": "expert_step_size"},
    "distil": {"steps": "unroll_steps", "batch_size": "outer_batch", "segments": "inits", "expert_epochs": "match_epochs",
               "rates.embeds": "lr", "checkpoint": "--name, or start over with --fresh"},
}


def add_flags(parser: argparse.ArgumentParser, step: str) -> None:
    """Add the settings of a step as flags, ``--outer-steps 100`` for ``outer_steps``; one that is not used has no value."""
    types, fields = typing.get_type_hints(Work), Work.__dataclass_fields__
    for name in STEPS[step].flags:
        default, help_text = fields[name].default, fields[name].metadata["description"]
        many = isinstance(default, tuple)
        if default is not None:
            help_text += f" (default {' '.join(map(str, default)) if many else default})"
        kinds = (types[name], *typing.get_args(types[name]), *(int for _ in range(many)))
        kind = next((kind for kind in (float, int) if kind in kinds), str)
        parser.add_argument(flag(name), type=kind, nargs="+" if many else None, default=argparse.SUPPRESS,
                            metavar=kind.__name__.upper(), help=help_text)


def settings_of(args: argparse.Namespace) -> tuple[Work, dict[str, str]]:
    """The settings of a step, and what the user calls each argument of the library that an error may name.

    Raises:
        ValueError: an unknown key or a bad value, named.
    """
    flags = {name: value for name, value in vars(args).items() if name in Work.__dataclass_fields__}
    work, path = Work.from_yaml(None, **flags), args.config
    if path is None and (saved := args.work / work.name / SETTINGS).is_file():
        path = saved
    called = {name: flag(name) for name in Work.__dataclass_fields__}
    if path is not None:
        work = Work.from_yaml(path, **flags)
        called |= {name: f"{path}: {name}" for name in read(path).keys() - flags}
    return work, called | {name: called.get(setting, setting) for name, setting in ARGUMENTS.get(args.command, {}).items()}
