"""Which demonstrations make a language model answer best: distilled ones against real ones, from 1 to k in a context.

One *seed* of this experiment is another set of everything.  A row is ``source/k``: k demonstrations of a source, several
orders, test questions that are the same for all; no demonstration is longer than another's ``length`` tokens.

Sources:

* ``zero-shot``: none.
* ``random``, ``k_center``: real sentences, filled up to the same length (:mod:`distillkit.evaluation.selection`).
* ``embeddings``: distilled by BPTT with the same language model, under a classifier's head; read as embeddings.
* ``projection``: their nearest tokens.  ``nearest sentences``: the real sentences nearest to them.
* ``swaps``: token swaps that start from ``k_center`` (:class:`~distillkit.text.swaps.SwapSearch`), the same model as judge.
* ``wrong labels``: those of ``random``, each told as the class after its own.  What it loses on ``random`` is what the
  model takes from the answers in a context rather than from its looks (Min et al., 2022).

The template is the one of several with the best accuracy on validation questions, over no demonstrations and
``judged_shots`` real ones that are shown in no row.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np

from distillkit.applications.prompting import FewShot, few_shot, questions
from distillkit.core.distilled import DistilledSet
from distillkit.core.distiller import Distiller
from distillkit.core.inner import SGD, Unroll
from distillkit.core.metagrad import recommend
from distillkit.core.objectives import BPTT
from distillkit.core.students import load_student
from distillkit.data.load import load_task
from distillkit.evaluation.evaluate import evaluate
from distillkit.evaluation.selection import select
from distillkit.experiments.results import SeededRun, Settings, paired_difference, shown
from distillkit.io.checks import check_choice, check_whole
from distillkit.io.seeds import derive_seed, generator
from distillkit.io.storage import is_vacant
from distillkit.text.judges import FrozenJudge
from distillkit.text.projection import corpus_tokens, project
from distillkit.text.sentences import nearest_sentences
from distillkit.text.swaps import SwapSearch

REAL = ("random", "k_center")
LEARNED = ("embeddings", "projection", "nearest sentences", "swaps")
SOURCES = ("zero-shot", *REAL, *LEARNED, "wrong labels")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptingJob(Settings):
    """Settings of one experiment.

    Args:
        name: of the result file.
        corpus, limit, max_length, student: as ``load_task`` and ``load_student`` take them; the student is a language model.
        per_class, length: size of every set: examples of a class, tokens an example.
        seeds: one set of everything each.
        orders: of the demonstrations, for each set and each k.
        test_rows, validation_rows: questions that are scored, and that choose the template; balanced.
        templates: questions to choose from, with ``{text}`` each.
        judged_shots: demonstrations with which templates are judged, besides none.
        separator: behind a demonstration.
        unroll_steps, step_size, outer_steps, outer_batch, lr: of the distillation, as for
            :class:`~distillkit.experiments.classification.ClassificationJob`.
        judge_steps, swap_steps, candidates, least: of the search, as for :class:`~distillkit.experiments.ways_to_text.TextJob`.
        rows: which rows, as ``source/k``; ``zero-shot/0``.
    """

    name: str
    corpus: str
    student: str
    rows: tuple[str, ...]
    limit: int | None = None
    max_length: int = 32
    per_class: int = 2
    length: int = 20
    seeds: tuple[int, ...] = (0, 1, 2)
    orders: int = 4
    test_rows: int = 400
    validation_rows: int = 120
    templates: tuple[str, ...] = ("{text}\nAnswer:",)
    judged_shots: int = 4
    separator: str = "\n\n"
    unroll_steps: int = 3
    step_size: float = 0.05
    outer_steps: int = 60
    outer_batch: int = 48
    lr: float = 0.01
    judge_steps: int = 400
    swap_steps: int = 60
    candidates: int = 64
    least: int = 2
    kind: str = "prompting"

    def __post_init__(self):
        self.check_name()
        check_choice("kind", self.kind, ("prompting",))
        for row in self.rows:
            source, _, k = row.partition("/")
            check_choice(f"the source of row {row!r}", source, SOURCES)
            if not k.isdecimal() or (source == "zero-shot") != (int(k) == 0):
                raise ValueError(f"a row is a source and its demonstrations, as in random/4 or zero-shot/0, not {row!r}")
        for key in ("max_length", "per_class", "length", "orders", "test_rows", "validation_rows", "judged_shots",
                    "unroll_steps", "outer_steps", "outer_batch", "judge_steps", "swap_steps", "candidates", "least"):
            check_whole(key, getattr(self, key))
        self.check_positive("step_size", "lr")
        if not self.seeds or not all(isinstance(s, int) for s in self.seeds):
            raise ValueError(f"seeds must be a list of whole numbers, not {self.seeds!r}")
        if not self.templates:
            raise ValueError("templates must list one at least")


class PromptingRun(SeededRun):
    """An experiment on prompts under way; see :class:`~distillkit.experiments.results.SeededRun`.

    ``student`` is the classifier that distils and selects; ``reader`` the language model that is given demonstrations.
    """

    job: PromptingJob

    def __init__(self, job: PromptingJob, folder: str | Path, work: str | Path):
        task = load_task(job.corpus, max_length=job.max_length, limit=job.limit)
        super().__init__(job, folder, work, task, load_student(job.student, task, trainable="full"))
        self.reader = load_student(job.student, questions(task), trainable="full")
        self._asked = None

    def _scored(self, source: str, k: str, seed: int) -> dict:
        if self._asked is None:
            self._asked = questions(self.task, template=self._template())
        rows = self.task.balanced_rows("test", min(self.job.test_rows, len(self.task.test)), generator("prompting-test", 0))
        return as_row(few_shot(self._asked, self.reader, self._shots(source, seed), k=int(k), rows=rows.tolist(), seed=seed,
                               **self._reading()))

    def _shots(self, source: str, seed: int):
        if source == "zero-shot":
            return ()
        if source == "wrong labels":
            shown = self.set_of("random", seed)
            names = shown.meta["classes"]
            return [(text, names[(label + 1) % len(names)])
                    for text, label in zip(shown.meta["text"], shown.meta["labels"], strict=True)]
        return self.set_of(source, seed)

    def _reading(self) -> dict:
        return {"orders": self.job.orders, "length": self.job.length, "separator": self.job.separator}

    def _template(self) -> str:
        """The template with the best accuracy on validation questions; judged once for a result."""
        noted = self.result["distilling"]
        if "template" not in noted:
            size = min(self.job.validation_rows, len(self.task.validation))
            rows = self.task.balanced_rows("validation", size, generator("prompting-validation", 0)).tolist()
            shots = select(self.task, self.student, "random", **self._size(derive_seed("prompting-template", 0)))
            found = {}
            for template in self.job.templates:
                asked = questions(self.task, template=template)
                found[template] = [
                    round(few_shot(asked, self.reader, shots, k=k, rows=rows, split="validation", **self._reading()).mean, 6)
                    for k in (0, self.job.judged_shots)
                ]
            noted["template"] = {"chosen": max(found, key=lambda template: np.mean(found[template])), "validation": found}
        return noted["template"]["chosen"]

    def _make(self, source: str, seed: int) -> DistilledSet:
        if source in REAL:
            return select(self.task, self.student, source, **self._size(seed))
        folder = self.work / f"{source.replace(' ', '_')}-{seed}"
        if is_vacant(folder):
            self._found(source, seed).save(folder)
        return DistilledSet.load(folder)

    def _found(self, source: str, seed: int) -> DistilledSet:
        if source == "projection":
            return project(self.set_of("embeddings", seed), self.student)
        if source == "nearest sentences":
            return nearest_sentences(self.set_of("embeddings", seed), self.task, self.student)
        return self._swapped(seed) if source == "swaps" else self._distilled(seed)

    def _distilled(self, seed: int) -> DistilledSet:
        job, start = self.job, DistilledSet.from_real(self.task, self.student, **self._size(seed))
        unroll = Unroll(job.unroll_steps, optimizer=SGD(job.step_size), metagrad=recommend(self.student)[0])
        objective = BPTT(self.task, self.student, unroll, batch_size=job.outer_batch)
        distiller = Distiller(start, objective, lr=job.lr, seed=seed, checkpoint_dir=self.work / f"checkpoint-{seed}")
        for _ in distiller.run(job.outer_steps):
            pass
        # That it was distilled shows in a student trained on it, by the recipe of the set, against where it started.
        trained = [evaluate(s, self.task, self.student, seeds=(0, 1), recipe=recipe).mean
                   for s, recipe in ((start, unroll), (distiller.distilled, "own"))]
        self._noted("embeddings", seed, distiller.records, [r.loss for r in distiller.records],
                    {"trained on the start": round(trained[0], 6), "trained on the set": round(trained[1], 6)})
        return distiller.distilled

    def _swapped(self, seed: int) -> DistilledSet:
        judge = FrozenJudge(self.task, self.student, steps=self.job.judge_steps)
        search = SwapSearch(
            self.set_of("k_center", seed), self.student, judge, candidates=self.job.candidates, seed=seed,
            allowed=corpus_tokens(self.task, self.student, least=self.job.least),
            checkpoint_dir=self.work / f"checkpoint-swaps-{seed}",
        )
        for _ in search.run(self.job.swap_steps):
            pass
        self._noted("swaps", seed, search.records, [r.after for r in search.records], {})
        return search.distilled

    def _noted(self, source: str, seed: int, records, losses: list[float], further: dict) -> None:
        seconds = round(sum(r.seconds for r in records), 1)
        self.result["distilling"][f"{source} {seed}"] = {
            "steps": len(records), "seconds": seconds, "losses": [round(loss, 4) for loss in losses], **further,
        }

    def _size(self, seed: int) -> dict:
        return {"per_class": self.job.per_class, "length": self.job.length, "seed": seed}


def as_row(found: FewShot) -> dict:
    """A score in context as JSON values, floats at six digits, null for what is not a number."""
    row = dataclasses.asdict(found)
    for key in ("mean", "std"):
        row[key] = round(row[key], 6) if math.isfinite(row[key]) else None
    for key in ("scores", "normalized", "calibrated"):
        row[key] = [round(s, 6) for s in row[key]]
    return row


def prompting_table(result: dict) -> str:
    """The result as a Markdown table: accuracy for each source and k, plainly and calibrated, and what it gains on random."""
    rows, names = result["rows"], result["config"]["rows"]
    lines = ["| demonstrations | k | accuracy (sd over orders) | minus random | calibrated | minus random | tokens | sets |",
             "|---|---:|---:|---:|---:|---:|---:|---:|"]
    for name in names:
        source, k = name.split("/")
        found = list(rows.get(name, {}).values())
        if not found:
            lines.append(f"| {source} | {k} | not run | | | | | |")
            continue
        left_out = sum(map(sum, (row["dropped"] for row in found)))
        cells = []
        for key in ("scores", "calibrated"):
            spread = _spread(found, key)
            cells += [f"{np.mean([row[key] for row in found]):.3f}" + (f" ({spread:.3f})" if spread is not None else ""),
                      _gain(rows, source, k, key)]
        tokens = np.mean([row["context"] for row in found])
        lines.append(f"| {source} | {k}{f' ({left_out} left out)' if left_out else ''} | {' | '.join(cells)} | "
                     f"{tokens:.0f} | {len(found)} |")
    if chosen := result["distilling"].get("template"):
        judged = "; ".join(f"{template!r} {' / '.join(f'{s:.2f}' for s in scores)}"
                           for template, scores in chosen["validation"].items())
        lines += ["", f"Template: `{chosen['chosen']!r}`, chosen on validation questions (no demonstrations / "
                  f"{result['config']['judged_shots']} random ones): `{judged}`."]
    return "\n".join(lines)


def _spread(found: list[dict], key: str) -> float | None:
    """The standard deviation over orders, n − 1, root mean square over the sets; None for one order."""
    if len(found[0][key]) < 2:
        return None
    return float(np.sqrt(np.mean([np.var(row[key], ddof=1) for row in found])))


def _gain(rows: dict, source: str, k: str, key: str) -> str:
    """What a source gains on random demonstrations at the same k and seed, with half of its 95 % interval over sets."""
    if source in ("zero-shot", "random") or f"random/{k}" not in rows:
        return ""
    means = {name: {seed: {"mean": float(np.mean(row[key]))} for seed, row in rows[f"{name}/{k}"].items()}
             for name in (source, "random")}
    return shown(*paired_difference(means, source, "random"))
