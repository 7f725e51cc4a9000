"""The steps of a distillation on the command line: ``experts``, ``distil``, ``evaluate``, ``transfer``, ``card``; and two
that look: ``verify`` and ``doctor``.

All steps of one piece of work are described by one :class:`Work`, and live in one folder, ``runs/NAME``: the settings that
replay it, experts, checkpoint, the set, its text, and every score.  So a whole experiment is::

    python -m distillkit distil --name first --corpus ag_news --student bert-base-uncased
    python -m distillkit evaluate --name first
    python -m distillkit card --name first

Settings come from flags, else from ``--config FILE.yaml``, else from what the folder was made with, else are defaults.
This module is imported to build the parser, so it imports nothing heavy until a step is run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import yaml

from distillkit.experiments.settings import (
    Data,
    Expert,
    Inner,
    Outer,
    SetSeed,
    Size,
    Target,
    filled,
    flag,
    names,
    option,
    read,
    renamed,
    settings,
    whole,
)
from distillkit.io.escaping import one_line, say

FRESH = "start over: what an earlier run has made is removed once the new one has begun to write"
SCORES, SETTINGS = "scores.jsonl", "settings.yaml"


@settings(name="work", corpus="docstrings", student="offline:minilm")
class Work(Data, Size, Expert, Inner, Outer, Target, SetSeed):
    """Settings of one piece of work; each field's help says what it is, and a bad value is an error that names it."""

    objective: Literal["bptt", "trajectory"] = option("bptt", "bptt, or trajectory, for which experts must be recorded first")
    optimizer: Literal["sgd", "momentum", "adamw"] = option("sgd", "optimiser of the inner loop: sgd, momentum or adamw")
    inits: int = whole(1, "initialisations, or expert segments, averaged in an outer step")
    checkpoint_every: int = whole(10, "outer steps between checkpoints")
    set: str | None = option(None, "folder or hub:owner/name of the set (default: that of --name)")
    recipe: Literal["own", "standard", "tuned"] | None = option(
        None, "own, standard or tuned (default: own if the set has one, else tuned)")
    seeds: tuple[int, ...] = filled((0, 1, 2), "fresh models that each score is the mean of")
    split: Literal["test", "validation"] = option("test", "split that scores are taken on: test or validation")
    license: str | None = option(None, "licence of the set, as the hub writes it, such as cc-by-4.0")
    corpus_license: str | None = option(None, "licence of the corpus, in words")


WHERE = ("name", *names(Data))
EXPERTS = (*(name for name in names(Expert) if name != "match_epochs"), "seed")
DISTIL = (*names(Size, Inner, Outer), "objective", "optimizer", "inits", "checkpoint_every", "match_epochs", "seed")
SCORED = ("set", "recipe", "seeds", "split")

# command -> {argument of the library: the setting that it is given, or what to say instead}
ARGUMENTS: dict[str, dict[str, str]] = {
    "experts": {"count": "expert_count", "epochs": "expert_epochs", "batch_size": "expert_batch",
                "step_size": "expert_step_size"},
    "distil": {"steps": "unroll_steps", "batch_size": "outer_batch", "segments": "inits", "expert_epochs": "match_epochs",
               "rates.embeds": "lr", "checkpoint": "--name, or start over with --fresh"},
}

# command -> (one line, the settings that are its flags, an example that teaches)
STEPS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "experts": ("train on all the data and write down the way there, to be matched by distil --objective trajectory",
                (*WHERE, *EXPERTS),
                "experts --name first --corpus docstrings --expert-epochs 2 --expert-count 2"),
    "distil": ("learn a set: embeddings into runs/NAME/set, their nearest words into runs/NAME/text",
               (*WHERE, *DISTIL),
               "distil --name first --corpus docstrings --outer-steps 100\n"
               "  torchrun --nproc-per-node 2 -m distillkit distil --name first --inits 4   (two processes, two each)\n"
               "  the same command goes on where an interrupted run stopped; runs/first/settings.yaml replays it"),
    "evaluate": ("train fresh models on a set, score them on held-out real text; adds a line to runs/NAME/scores.jsonl",
                 (*WHERE, *SCORED),
                 "evaluate --name first                       the set of that name, under its own recipe\n"
                 "  python -m distillkit evaluate --name first --set runs/first/text --recipe tuned"),
    "transfer": ("score a set's text on another model, which reads it with its own tokenizer",
                 (*WHERE, *SCORED, "target"),
                 "transfer --name first --target offline:distil-minilm"),
    "card": ("print a set's dataset card, with the scores of runs/NAME/scores.jsonl that are this set's; or publish it",
             (*WHERE, "set", "license", "corpus_license"),
             "card --name first --out runs/first/published\n"
             "  python -m distillkit card --name first --set runs/first/text --push me/six-sentences   (private)"),
}
_EPILOG = """example:
  python -m distillkit {example}

All settings may stand in a YAML file (--config), as in 'outer_steps: 100'; flags win over it. Without --config a step
takes up the settings that runs/NAME was distilled with. Exit codes: 0 done, 2 something is wrong with what was asked;
130 interrupted, 143 and 129 ended by SIGTERM and SIGHUP (give the same command again to go on)."""


def add_commands(commands) -> None:
    """Add the parsers of all steps, ``verify`` and ``doctor`` to argparse's ``commands``."""
    types = typing.get_type_hints(Work)
    fields = {f.name: f for f in dataclasses.fields(Work)}
    for step, (told, flags, example) in STEPS.items():
        parser = _parser(commands, step, told, _EPILOG.format(example=example))
        for name in flags:
            _add_flag(parser, fields[name], types[name])
        parser.add_argument("--config", type=Path, help="YAML file of settings")
        parser.add_argument("--work", type=Path, default=Path("runs"), help="folder of all work (default runs)")
        if step in ("experts", "distil"):
            parser.add_argument("--fresh", action="store_true", help=FRESH)
        if step == "card":
            parser.add_argument("--origin", action="store_true", help="load corpus and student to say where they came from")
            parser.add_argument("--out", type=Path, help="write the published folder here instead of printing the card")
            parser.add_argument("--push", metavar="OWNER/NAME", help="put it on the Hugging Face hub, in a private repository")
            parser.add_argument("--public", action="store_true", help="make that repository public")
    verify = _parser(commands, "verify", "check every byte of every distillkit folder below some folders, a line each",
                     "example:\n  python -m distillkit verify runs\n\nExit codes: 0 all is as it was written, 1 something is "
                     "damaged, 2 there is nothing to check.")
    verify.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    doctor = _parser(commands, "doctor", "say what this machine and a model can do",
                     "example:\n  python -m distillkit doctor --student offline:tiny-opt\n\nIt downloads nothing but what the "
                     "student needs, and asks the hub once (not under HF_HUB_OFFLINE=1).")
    doctor.add_argument("--student", default="offline:minilm", help="the model to look at (default offline:minilm)")


def _parser(commands, name: str, told: str, epilog: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=told, description=told[0].upper() + told[1:] + ".", epilog=epilog, allow_abbrev=False,
                               formatter_class=argparse.RawDescriptionHelpFormatter)


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field, annotation) -> None:
    """``--outer-steps 100`` for the field ``outer_steps``; absent where it is not given, so that a file may say it."""
    default = field.default if isinstance(field.default, tuple) else None
    told = field.metadata["description"] + ("" if field.default is None else f" (default {_shown(field.default)})")
    kinds = [kind for kind in (int, float, str) if kind in (annotation, *typing.get_args(annotation))] or [str]
    parser.add_argument(flag(field.name), dest=field.name, type=kinds[0], nargs="+" if default else None,
                        default=argparse.SUPPRESS, metavar=kinds[0].__name__.upper(), help=told.replace("%", "%%"))


def _shown(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def settings_of(args: argparse.Namespace) -> Work:
    """The settings of a step: flags, else the file, else what the folder of that name was made with, else defaults.

    Raises:
        ValueError: an unknown key, or a bad value, named.
    """
    path, given = _sources(args)
    return Work.from_yaml(path, **given)


def _sources(args: argparse.Namespace) -> tuple[Path | None, dict]:
    """The file of settings of a step, if there is one, and the settings that are flags."""
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(Work) if hasattr(args, field.name)}
    path = args.config
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"no file of settings {path}")
    if path is None:
        made = args.work / Work.from_yaml(None, **given).name / SETTINGS
        path = made if made.is_file() else None
    return path, given


def run(args: argparse.Namespace) -> int:
    """Run the step, or the look, that ``args.command`` names; returns the exit code."""
    if args.command == "verify":
        return verify(args.folders)
    if args.command == "doctor":
        for line in doctor(args.student):
            say(line)
        return 0
    steps = {"experts": experts, "distil": distil, "evaluate": evaluate, "transfer": transfer, "card": card}
    work, (path, given) = settings_of(args), _sources(args)
    try:
        steps[args.command](work, args)
    except (ValueError, FloatingPointError) as error:
        names = {field.name: flag(field.name) for field in dataclasses.fields(Work)}
        names |= {key: f"{path}: {key}" for key in (read(path).keys() if path else set()) - given.keys()}
        for argument, setting in ARGUMENTS.get(args.command, {}).items():
            names[argument] = names.get(setting, setting)
        raise ValueError(renamed(error, names)) from error
    return 0


# --- steps -----------------------------------------------------------------------------------------------------------


def _world(work: Work, student: str | None = None):
    from distillkit.core.loading import load_student
    from distillkit.experiments.runner import load_corpus

    task = load_corpus(work, seed=work.seed)
    loaded = load_student(student or work.student, task, trainable=None if student else work.trainable)
    rows = " / ".join(str(len(split)) if split else "no" for split in (task.train, task.validation, task.test))
    say(f"{task.name}: {rows} rows; student {loaded.name}", error=True)
    return task, loaded


def _keep(work: Work, folder: Path) -> None:
    """Write down the settings that replay a step, those of the steps before it included."""
    from distillkit.io.storage import save_text, sealed_text

    values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(work).items()}
    save_text(folder / SETTINGS, sealed_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True)))


def experts(work: Work, args: argparse.Namespace) -> None:
    """``python -m distillkit experts``; several processes share the experts, under ``torchrun`` or started by hand."""
    from distillkit.applications.processes import team
    from distillkit.core.experts import record_experts
    from distillkit.core.optimizers import AdamW
    from distillkit.io.restart import started
    from distillkit.io.storage import Claim

    folder = args.work / work.name
    recorded = folder / "experts"
    with team() as ranks:
        task, student = _world(work)
        run = started(Claim(recorded, wait=True, shared=True), recorded, fresh=args.fresh) if ranks.leads else nullcontext()
        with run:
            ranks.wait()
            made = record_experts(
                task, student, recorded, count=work.expert_count, epochs=work.expert_epochs,
                optimizer=AdamW(work.expert_step_size), batch_size=work.expert_batch, micro_batch=16,
                snapshots_per_epoch=work.snapshots_per_epoch, seed=work.seed,
            )
            if ranks.leads:
                _keep(work, folder)
                say(f"{len(made)} experts of {made.snapshots} snapshots, {made.nbytes / 1e6:.1f} MB: {recorded}")


def _objective(work: Work, task, student, folder: Path):
    from distillkit.core.experts import Experts
    from distillkit.core.objectives import BPTT, TrajectoryMatching
    from distillkit.core.optimizers import SGD, AdamW, Momentum
    from distillkit.experiments.runner import strategy, unroll_of

    optimizer = {"sgd": SGD, "momentum": Momentum, "adamw": lambda size: AdamW(size, eps_root=1e-8)}
    unroll = unroll_of(work, optimizer=optimizer[work.optimizer](work.step_size))
    metagrad = strategy(work.metagrad)
    if work.objective == "bptt":
        return BPTT(task, student, unroll, metagrad=metagrad, batch_size=work.outer_batch, inits=work.inits)
    if not (folder / "experts").exists():
        raise FileNotFoundError(f"no experts {folder / 'experts'}; record them with: python -m distillkit experts --name "
                                f"{work.name}")
    recorded = Experts.load(folder / "experts")
    return TrajectoryMatching(task, student, unroll, recorded, metagrad=metagrad, expert_epochs=work.match_epochs,
                              segments=work.inits)


def distil(work: Work, args: argparse.Namespace) -> None:
    """``python -m distillkit distil``; under ``torchrun`` with ``--inits`` spread over its processes."""
    from distillkit.applications.processes import team
    from distillkit.core.distilled import DistilledSet
    from distillkit.core.estimate import announce
    from distillkit.io.restart import started
    from distillkit.io.storage import Claim

    folder = args.work / work.name
    with team() as ranks:
        task, student = _world(work)
        start = DistilledSet.from_real(task, student, **work.size(work.seed))
        objective = _objective(work, task, student, folder)
        if ranks.leads:
            announce(start, objective, work.outer_steps)
        # A recording that starts over must not take away what is read here.
        matched = Claim(folder / "experts", wait=True, shared=True) if work.objective == "trajectory" else nullcontext()
        made = [folder / part for part in ("checkpoint", "set", "text")]
        with matched, started(Claim(folder), *made, fresh=args.fresh) if ranks.leads else nullcontext():
            ranks.wait()
            _learn(work, folder, start, ranks.shared(objective), student, ranks.leads)


def _learn(work: Work, folder: Path, start, objective, student, leads: bool) -> None:
    """Distil, write what came of it, and show it."""
    from distillkit.core.distilled import KIND
    from distillkit.core.distiller import Distiller
    from distillkit.io.files import refuse_to_overwrite
    from distillkit.text.projection import project

    distiller = Distiller(start, objective, **work.rates(), seed=work.seed, checkpoint=folder / "checkpoint",
                          checkpoint_every=work.checkpoint_every, writes=leads)
    if not leads:
        for _ in distiller.run(work.outer_steps):
            pass
        return
    for part in ("set", "text"):  # now, and not after the last step
        refuse_to_overwrite(folder / part, KIND)
    with distiller.checkpoint.claim:
        _keep(work, folder)
        for record in distiller.run(work.outer_steps):
            if record.step % max(1, work.outer_steps // 10) == 0:
                say(f"step {record.step}: loss {record.loss:.3f}")
    learned = distiller.distilled
    learned.save(folder / "set")
    words = project(learned, student)
    words.save(folder / "text")
    say(f"{len(learned)} examples, {learned.nbytes:,} bytes: {folder / 'set'}; as words: {folder / 'text'}")
    for row in words.to_text().select(range(min(3, len(words)))).to_list():
        say("  " + " | ".join(one_line(row[key], 100) for key in ("label", "prompt", "text", "response") if key in row))
    say(f"what it is worth: python -m distillkit evaluate --name {work.name}")


def evaluate(work: Work, args: argparse.Namespace) -> None:
    """``python -m distillkit evaluate``; under ``torchrun`` with the seeds spread over its processes."""
    from distillkit.applications.processes import team

    found = read_set(work.set or args.work / work.name / "set")
    with team() as ranks:
        task, student = _world(work)
        made = ranks.evaluate(found, task, student, seeds=work.seeds, recipe=work.recipe, split=work.split)
        if ranks.leads:
            _note(args.work / work.name, found, task, student, work, made)


def transfer(work: Work, args: argparse.Namespace) -> None:
    """``python -m distillkit transfer``."""
    from distillkit.applications.transfer import transfer as score

    found = read_set(work.set or args.work / work.name / "text")
    task, student = _world(work, work.target)
    recipe = work.recipe or "tuned"
    made = score(found, task, student, seeds=work.seeds, recipe=recipe, split=work.split)
    _note(args.work / work.name, found, task, student, work, made)


def _note(folder: Path, found, task, student, work: Work, made) -> None:
    """Print a score, and add it to those of this piece of work."""
    from distillkit.core.distiller import digest
    from distillkit.experiments.results import as_json
    from distillkit.io.storage import append_line

    row = {"set": digest(found), "student": student.name, "trainable": student.trainable, "corpus": task.name,
           "corpus_sha256": task.fingerprint, "split": work.split, "seeds": list(work.seeds), **as_json(made)}
    append_line(folder / SCORES, row)
    say(f"{made}: {student.name} trained on {len(found)} examples, {work.split} split of {task.name}")


def read_set(source: str | Path):
    """A set from a folder that was saved or published, or from ``hub:owner/name`` (``hub:owner/name@revision``).

    Raises:
        FileNotFoundError: there is none.
        StorageError: it is damaged.
    """
    from distillkit.applications.publish import from_hub, load_published
    from distillkit.core.distilled import DistilledSet
    from distillkit.io.verify import SUMS

    if str(source).startswith("hub:"):
        repo_id, _, revision = str(source).removeprefix("hub:").partition("@")
        return from_hub(repo_id, revision or None)
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no set {path}; make one with: python -m distillkit distil, or name another with --set")
    return load_published(path) if (path / SUMS).exists() else DistilledSet.load(path)


def card(work: Work, args: argparse.Namespace) -> None:
    """``python -m distillkit card``."""
    from distillkit.applications import publish

    found = read_set(work.set or args.work / work.name / "set")
    about = {"evaluations": _scores(args.work / work.name / SCORES, found), "license": work.license,
             "corpus_license": work.corpus_license}
    if args.origin:
        about |= dict(zip(("task", "student"), _world(work)))
    if args.push:
        say(publish.push_to_hub(found, args.push, private=not args.public, **about))
    elif args.out:
        say(publish.save_published(found, args.out, **about))
    else:
        say(publish.card(found, work.name, **about).removesuffix("\n"))


def _scores(path: Path, found) -> dict:
    """The scores in a file that were taken of this very set, by what they were taken on; the last of a kind counts."""
    from distillkit.core.distiller import digest
    from distillkit.evaluation.evaluate import Evaluation
    from distillkit.io.storage import read_lines

    names = [f.name for f in dataclasses.fields(Evaluation)]
    scores, own = {}, digest(found)
    for number, row in enumerate(read_lines(path), start=1):
        try:
            if row["set"] == own:
                one = Evaluation(**{name: row.get(name) for name in names})
                where = f"{row['split']} split of {row['corpus']}, {row['student']}, {one.recipe['name']}"
                scores[where] = dataclasses.replace(one, scores=tuple(one.scores))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no score ({error!r}); delete the line") from error
    return scores


# --- looks -----------------------------------------------------------------------------------------------------------

def verify(paths: list[Path]) -> int:
    """Check every file at or below ``paths``, print a line each; returns the exit code.

    Raises:
        FileNotFoundError: one of the paths is not there, or none holds anything of distillkit's.
        OSError: a folder below one of them cannot be read.
    """
    from distillkit.io.verify import DAMAGED, NOT_CHECKED
    from distillkit.io.verify import verify as states

    counts = Counter()
    for top in paths:
        if not top.exists():
            raise FileNotFoundError(f"no file or folder {top}")
        for path, state, what in states(top):
            counts[state] += 1
            say(f"{state:11} {one_line(path)}: {one_line(what)}")
    if not counts.keys() - {NOT_CHECKED}:
        raise FileNotFoundError(f"nothing of distillkit's is stored below {', '.join(map(str, paths))}")
    say(", ".join(f"{count} {state}" for state, count in counts.items()))
    return 1 if counts[DAMAGED] else 0


def doctor(student: str = "offline:minilm") -> Iterator[str]:
    """What this machine and a model can do, line by line."""
    yield from _versions()
    yield from _machine()
    yield f"hub: {_hub()}"
    yield from _data()
    yield from _files(student)
    yield from _model(student)


def _versions() -> Iterator[str]:
    import importlib.metadata
    import platform

    from packaging.requirements import Requirement

    from distillkit.io.version import __version__

    yield f"distillkit {__version__}, Python {platform.python_version()} on {platform.system()} ({platform.machine()})"
    try:
        wanted = [Requirement(line) for line in importlib.metadata.requires("distillkit") or ()]
    except importlib.metadata.PackageNotFoundError:
        yield "  not installed as a package, so the versions it needs are unknown; pip install -e ."
        return
    for one in wanted:
        extra = one.marker is not None and not one.marker.evaluate({"extra": ""})
        try:
            found = importlib.metadata.version(one.name)
        except importlib.metadata.PackageNotFoundError:
            yield f"  {one.name}: absent, {'optional' if extra else f'NEEDED: pip install {one.name}{one.specifier}'}"
            continue
        enough = one.specifier.contains(found, prereleases=True)
        yield f"  {one.name} {found}: {'ok' if enough else 'TOO OLD OR TOO NEW'} ({one.specifier or 'any'})"


def _machine() -> Iterator[str]:
    import torch

    from distillkit.io.storage import cache_dir

    pages = "SC_PHYS_PAGES" in os.sysconf_names
    memory = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB" if pages else "unknown"
    yield f"cores {os.cpu_count()}, torch threads {torch.get_num_threads()}, memory {memory}"
    yield f"disk: {shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB free here; cache: {cache_dir()}"
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        yield f"device: {torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    else:
        yield "device: CPU (torch sees no GPU)"


def _hub() -> str:
    """Whether the Hugging Face hub answers, asked once and briefly."""
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "not asked (HF_HUB_OFFLINE is set); only its cache is used"
    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=3):
            return f"reachable ({constants.ENDPOINT})"
    except urllib.error.HTTPError as error:  # it answered
        return f"reachable ({constants.ENDPOINT}, status {error.code})"
    except (OSError, ValueError) as error:
        return f"NOT reachable ({constants.ENDPOINT}: {error}); corpora and models must be here already"


def _data() -> Iterator[str]:
    from distillkit.data.corpora import KNOWN

    root = os.environ.get("DISTILLKIT_DATA")
    if not root:
        yield "DISTILLKIT_DATA: not set; corpora known by name come from the hub"
        return
    yield f"DISTILLKIT_DATA: {root}{'' if Path(root).expanduser().is_dir() else ' (NO SUCH FOLDER)'}"
    for name in KNOWN:
        folder = Path(root).expanduser() / name
        files = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
        yield f"  {name}: {', '.join(files) if files else 'absent'}"


def _files(source: str) -> Iterator[str]:
    """What is read of a local model folder, and which of its files are pickles, code or weights that never are."""
    from distillkit.core.model_files import inventory

    for word, files in zip(("read", "left out"), inventory(source)):
        if files:
            yield f"  files {word}: {', '.join(one_line(name, 100) for name in files)}"


def _model(source: str) -> Iterator[str]:
    """What a model is as a classifier and as a language model, or why it is none; an error where it is neither."""
    import tempfile

    from distillkit.data.load import load_task

    rows = {
        "classifier": [{"text": f"a sentence of class {c}", "label": c} for c in ("one", "two")],
        "language model": [{"prompt": f"the number before {c} is", "response": f"not {c}"} for c in ("one", "two")],
    }
    errors = []
    for role, examples in rows.items():
        with tempfile.TemporaryDirectory() as folder:
            for split in ("train", "validation", "test"):
                (Path(folder) / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in examples))
            task = load_task(folder, max_length=16)
        try:
            yield from _student(source, role, task)
        except ValueError as error:
            errors.append(error)
            yield f"student {source} as {role}: none ({error})"
    if len(errors) == len(rows):
        raise errors[0]


def _student(source: str, role: str, task) -> Iterator[str]:
    """What a student is, which derivatives each kind of attention has, tried on a sentence, and its adapters."""
    from distillkit.core.estimate import recommend
    from distillkit.core.loading import load_student

    for attention in ("eager", "sdpa"):
        try:
            student = load_student(source, task, trainable="full", attention=attention)
        except ValueError as error:
            if attention == "eager":
                raise
            yield f"  attention {attention}: none ({error})"
            break
        if attention == "eager":
            trained = sum(p.numel() for p in student.init(0).values())
            yield (f"student {student.name} as {role}: {student.module.config.model_type}, {trained:,} parameters trained, "
                   f"embeddings [{', '.join(map(str, student.embedding.shape))}], {student.max_positions} positions, on "
                   f"{student.device}")
        first, second = (_tried(lambda order=order, s=student: _derivative(s, task, order)) for order in (1, 2))
        strategy, reason = recommend(student, task if first == "ok" else None)
        yield f"  attention {attention}: first derivatives {first}, second {second}; use {type(strategy).__name__} ({reason})"
    try:
        adapters = load_student(source, task, trainable="lora")
    except ValueError as error:
        yield f"  LoRA: none ({error})"
    else:
        yield f"  LoRA: {sum(p.numel() for n, p in adapters.init(0).items() if '.lora_' in n):,} parameters in adapters"


def _derivative(student, task, order: int) -> bool:
    """Whether the gradient of a loss, or of a gradient's norm, with respect to an input is finite."""
    import torch

    batch = task.batch(student.tokenizer, "train", [0, 1])
    embeds = student.embedding[batch["input_ids"].to(student.device)].clone().requires_grad_()
    params = {n: p.requires_grad_() for n, p in student.init(0).items()}
    inputs = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}
    loss = student.loss(params, inputs, batch["labels"].to(student.device))
    if order == 2:
        grads = torch.autograd.grad(loss, [*params.values()], create_graph=True, allow_unused=True)
        loss = torch.stack([g.square().sum() for g in grads if g is not None]).sum()
    return bool(torch.autograd.grad(loss, embeds)[0].isfinite().all())


def _tried(attempt: Callable[[], bool]) -> str:
    try:
        return "ok" if attempt() else "NOT FINITE"
    except (RuntimeError, NotImplementedError) as error:
        return f"none ({str(error).splitlines()[0][:80]})"
