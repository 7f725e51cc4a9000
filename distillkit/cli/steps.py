"""The steps of a distillation on the command line: ``experts``, ``distil``, ``evaluate``, ``transfer``, ``card``.

Each is a function of the settings (:class:`~distillkit.cli.work.Work`) and the arguments that are no settings.
"""

from __future__ import annotations

import argparse
import dataclasses
from contextlib import nullcontext
from pathlib import Path

import yaml

from distillkit.applications import publish
from distillkit.applications.processes import team
from distillkit.applications.transfer import transfer as transferred
from distillkit.cli.work import SETTINGS, Work, settings_of
from distillkit.core.distilled import KIND, DistilledSet
from distillkit.core.distiller import Distiller, digest
from distillkit.core.estimate import announce
from distillkit.core.experts import Experts, record_experts
from distillkit.core.loading import load_student
from distillkit.core.objectives import BPTT, TrajectoryMatching
from distillkit.core.optimizers import SGD, AdamW, Momentum
from distillkit.evaluation.evaluate import Evaluation
from distillkit.experiments.building import load_corpus, start_of, strategy, unroll_of
from distillkit.experiments.results import as_config, as_json
from distillkit.experiments.settings import renamed
from distillkit.io.escaping import one_line, say
from distillkit.io.files import refuse_to_overwrite
from distillkit.io.restart import started
from distillkit.io.storage import Claim, append_line, read_lines, save_text, sealed_text
from distillkit.io.verify import SUMS
from distillkit.text.projection import project

SCORES = "scores.jsonl"


def step(args: argparse.Namespace) -> None:
    """Run the step that ``args.command`` names."""
    steps = {"experts": experts, "distil": distil, "evaluate": evaluate, "transfer": transfer, "card": card}
    work, called = settings_of(args)
    try:
        steps[args.command](work, args)
    except (ValueError, FloatingPointError) as error:
        raise ValueError(renamed(error, called)) from error


def _world(work: Work, student: str | None = None):
    """The task, and the student of the settings or another one."""
    task = load_corpus(work, seed=work.seed)
    loaded = load_student(student or work.student, task, trainable=None if student else work.trainable)
    rows = " / ".join(str(len(split)) if split else "no" for split in (task.train, task.validation, task.test))
    say(f"{task.name}: {rows} rows; student {loaded.name}", error=True)
    return task, loaded


def _save_settings(work: Work, folder: Path) -> None:
    """Write down the settings that replay a step, those of the steps before it included."""
    save_text(folder / SETTINGS, sealed_text(yaml.safe_dump(as_config(work), sort_keys=False, allow_unicode=True)))


def experts(work: Work, args: argparse.Namespace) -> None:
    """``python -m distillkit experts``; several processes share the experts, under ``torchrun`` or started by hand."""
    folder = args.work / work.name / "experts"
    with team() as ranks:
        task, student = _world(work)
        run = started(Claim(folder, wait=True, shared=True), folder, fresh=args.fresh) if ranks.leads else nullcontext()
        with run:
            ranks.wait()
            recorded = record_experts(
                task, student, folder, count=work.expert_count, epochs=work.expert_epochs,
                optimizer=AdamW(work.expert_step_size), batch_size=work.expert_batch, micro_batch=16,
                snapshots_per_epoch=work.snapshots_per_epoch, seed=work.seed,
            )
            if ranks.leads:
                _save_settings(work, folder.parent)
                say(f"{len(recorded)} experts of {recorded.snapshots} snapshots, {recorded.nbytes / 1e6:.1f} MB: {folder}")


def _objective(work: Work, task, student, folder: Path):
    size = work.first_step_size()
    optimizers = {"sgd": SGD(size), "momentum": Momentum(size), "adamw": AdamW(size, eps_root=1e-8)}
    unroll, metagrad = unroll_of(work, optimizer=optimizers[work.optimizer]), strategy(work.metagrad)
    if work.objective == "bptt":
        return BPTT(task, student, unroll, metagrad=metagrad, batch_size=work.outer_batch, inits=work.inits)
    if not (folder / "experts").exists():
        raise FileNotFoundError(f"no experts {folder / 'experts'}; record them with: python -m distillkit experts --name "
                                f"{work.name}")
    return TrajectoryMatching(task, student, unroll, Experts.load(folder / "experts"), metagrad=metagrad,
                              expert_epochs=work.match_epochs, segments=work.inits)


def distil(work: Work, args: argparse.Namespace) -> None:
    """``python -m distillkit distil``; under ``torchrun`` with ``--inits`` spread over its processes."""
    folder = args.work / work.name
    with team() as ranks:
        task, student = _world(work)
        start = start_of(work, task, student, work.seed)
        objective = _objective(work, task, student, folder)
        if ranks.leads:
            announce(start, objective, work.outer_steps)
        # A recording that starts over must not take away what is read here.
        matched = Claim(folder / "experts", wait=True, shared=True) if work.objective == "trajectory" else nullcontext()
        outputs = [folder / part for part in ("checkpoint", "set", "text")]
        with matched, started(Claim(folder), *outputs, fresh=args.fresh) if ranks.leads else nullcontext():
            ranks.wait()
            _learn(work, folder, start, ranks.shared(objective), student, ranks.leads)


def _learn(work: Work, folder: Path, start, objective, student, leads: bool) -> None:
    """Distil, write the set and its nearest words, and show them."""
    distiller = Distiller(start, objective, **work.rates(), clip=work.clip, seed=work.seed, checkpoint=folder / "checkpoint",
                          checkpoint_every=work.checkpoint_every, writes=leads)
    if not leads:
        for _ in distiller.run(work.outer_steps):
            pass
        return
    for part in ("set", "text"):  # now, and not after the last step
        refuse_to_overwrite(folder / part, KIND)
    with distiller.checkpoint.claim:
        _save_settings(work, folder)
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
    say(f"next, measure its accuracy: python -m distillkit evaluate --name {work.name}")


def evaluate(work: Work, args: argparse.Namespace) -> None:
    """``python -m distillkit evaluate``; under ``torchrun`` with the seeds spread over its processes."""
    distilled = read_set(work.set or args.work / work.name / "set")
    with team() as ranks:
        task, student = _world(work)
        score = ranks.evaluate(distilled, task, student, seeds=work.seeds, recipe=work.recipe, split=work.split)
        if ranks.leads:
            _note(args.work / work.name, distilled, task, student, work, score)


def transfer(work: Work, args: argparse.Namespace) -> None:
    """``python -m distillkit transfer``."""
    distilled = read_set(work.set or args.work / work.name / "text")
    task, student = _world(work, work.target)
    score = transferred(distilled, task, student, seeds=work.seeds, recipe=work.recipe or "tuned", split=work.split)
    _note(args.work / work.name, distilled, task, student, work, score)


def _note(folder: Path, distilled, task, student, work: Work, score) -> None:
    """Print a score, and add it to those of this piece of work."""
    row = {"set": digest(distilled), "student": student.name, "trainable": student.trainable, "corpus": task.name,
           "corpus_sha256": task.fingerprint, "split": work.split, "seeds": list(work.seeds), **as_json(score)}
    append_line(folder / SCORES, row)
    say(f"{score}: {student.name} trained on {len(distilled)} examples, {work.split} split of {task.name}")


def read_set(source: str | Path) -> DistilledSet:
    """A set from a folder that was saved or published, or from ``hub:owner/name`` (``hub:owner/name@revision``).

    Raises:
        FileNotFoundError: there is none.
        StorageError: it is damaged.
    """
    if str(source).startswith("hub:"):
        repo_id, _, revision = str(source).removeprefix("hub:").partition("@")
        return publish.from_hub(repo_id, revision or None)
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no set {path}; make one with: python -m distillkit distil, or name another with --set")
    return publish.load_published(path) if (path / SUMS).exists() else DistilledSet.load(path)


def card(work: Work, args: argparse.Namespace) -> None:
    """``python -m distillkit card``."""
    distilled = read_set(work.set or args.work / work.name / "set")
    about = {"evaluations": _scores(args.work / work.name / SCORES, digest(distilled)), "license": work.license,
             "corpus_license": work.corpus_license}
    if args.origin:
        about |= dict(zip(("task", "student"), _world(work)))
    if args.push:
        say(publish.push_to_hub(distilled, args.push, private=not args.public, **about))
    elif args.out:
        say(publish.save_published(distilled, args.out, **about))
    else:
        say(publish.card(distilled, work.name, **about).removesuffix("\n"))


def _scores(path: Path, set_digest: str) -> dict[str, Evaluation]:
    """The scores in a file of the set with this digest, by what they were taken on; the last of a kind counts."""
    names, scores = [field.name for field in dataclasses.fields(Evaluation)], {}
    for number, row in enumerate(read_lines(path), start=1):
        try:
            if row["set"] == set_digest:
                score = Evaluation(**{name: row.get(name) for name in names} | {"scores": tuple(row["scores"])})
                scores[f"{row['split']} split of {row['corpus']}, {row['student']}, {score.recipe['name']}"] = score
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no score ({error!r}); delete the line") from error
    return scores
