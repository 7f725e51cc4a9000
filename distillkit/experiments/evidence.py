"""What distilled sets are worth beside every cheap opponent: one corpus, several sizes, the same protocol for all.

Set seed s selects a bootstrap of the training rows (:func:`~distillkit.data.tasks.bootstrap`).  Every method of that seed sees
those rows, deterministic ones too, so that each has a spread over sets and gains are paired.  Each set is scored on several
fresh initialisations.  A text that does not depend on the drawn rows is one set, and is counted once.

Cheap opponents, each in seconds: ``class names`` (each class's name as its text), ``written`` (sentences written by hand,
``written.yaml``, which says what their author had seen), the selections ``random``, ``k_center``, ``herding`` and
``k_means``, and ``keywords``.  Any of them may have soft labels of a teacher, the TF-IDF classifier (``random + teacher
labels``).

Beside them:

* ``published``: another project's sets (``from_text``), set number s for seed s; they were made from other rows than ours.
* ``chosen sentences``: real sentences that a frozen judge chooses (:func:`~distillkit.text.sentences.search_sentences`).
* ``model-written``: sentences that a language model writes after reading training rows of a class
  (:func:`~distillkit.text.writing.write_sentences`), the first it wrote; ``chosen model-written``: those that the judge of
  ``chosen sentences`` takes from all it wrote.
* ``searched keywords``: the keywords after a search that asks several encoders at once, each by what its head reads first and
  by all its layers (:func:`~distillkit.text.keywords.search_keywords`).
* ``real + learned labels``: random sentences whose soft labels and step sizes were learned; ``keywords + learned labels``: the
  keywords likewise.  Embeddings that start from keywords learn these labels and step sizes too, and the vectors besides.
* ``embeddings``: distilled by BPTT; ``embeddings + attention labels`` with labels for the attention of the first token too
  (Maekawa et al., 2023); ``embeddings float16`` and ``embeddings low rank`` store them in fewer bytes.
* ``tfidf``, ``linear probe``: classifiers on all rows, of the bootstrap (``all``) or of the corpus as it is (``corpus``).
* ``full``: the student trained on the corpus as it is.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd

from distillkit.applications.costs import as_float16, low_rank, low_rank_bytes, set_bytes
from distillkit.applications.prompting import questions
from distillkit.core.distilled import DistilledSet
from distillkit.core.loading import load_student
from distillkit.core.student import Student
from distillkit.data.tasks import Task, bootstrap
from distillkit.evaluation.recipes import Tuned
from distillkit.evaluation.selection import SELECTIONS
from distillkit.evaluation.upper_lines import linear_probe_accuracy, tfidf_accuracy
from distillkit.evaluation.words import with_teacher_labels
from distillkit.experiments.classification import KEYWORD_LABELS, LEARNED_LABELS, ClassificationCell
from distillkit.experiments.results import (
    by_set,
    corrected,
    frame,
    gain,
    has_interval,
    markdown,
    number,
    of_the_corpus,
    rank_correlation,
    rounded,
    spread,
)
from distillkit.experiments.runner import Cell, Scores
from distillkit.experiments.settings import (
    REQUIRED,
    Data,
    Experiment,
    Grid,
    Inner,
    Outer,
    Scoring,
    Seeds,
    SetSeeds,
    Size,
    filled,
    option,
    read,
    settings,
    whole,
)
from distillkit.io.checks import check_choice
from distillkit.text.judges import READS, FrozenJudge, JointJudge
from distillkit.text.keywords import search_keywords
from distillkit.text.sentences import search_sentences
from distillkit.text.writing import write_sentences

WRITTEN = Path(__file__).parent / "written.yaml"  # {corpus: {class: its sentences}}
BY_HAND = ("class names", "written")  # texts that do not depend on the drawn rows
PUBLISHED, CHOSEN, SEARCHED = "published", "chosen sentences", "searched keywords"
CANDIDATES, MODEL_WRITTEN, CHOSEN_WRITTEN = "candidates", "model-written", "chosen model-written"
ATTENTION, FLOAT16, LOW_RANK = "embeddings + attention labels", "embeddings float16", "embeddings low rank"
CHEAP = (*BY_HAND, *SELECTIONS)
TEACHER = " + teacher labels"
UPPER = ("tfidf", "linear probe")
ROWS = (
    *(f"{method}{labels}/tuned" for method in (*CHEAP, PUBLISHED, CHOSEN, SEARCHED, MODEL_WRITTEN, CHOSEN_WRITTEN)
      for labels in ("", TEACHER)),
    f"{LEARNED_LABELS}/own", f"{KEYWORD_LABELS}/own", f"{KEYWORD_LABELS}/tuned",
    *(f"embeddings/{recipe}" for recipe in ("own", "tuned", "standard")),
    *(f"{method}/own" for method in (ATTENTION, FLOAT16, LOW_RANK)),
    *(f"{method}/{rows}" for method in UPPER for rows in ("all", "corpus")),
    "full/standard",
)
WORD_JUDGE = {"steps": 20, "batch_size": 512}  # of the judges of searched keywords
LAST = 5  # outer losses at the end of a distillation, whose mean is what it was screened by


@settings(kind="evidence", rows=ROWS, metagrad="forward_difference", eval_seeds=(0, 1, 2))
class EvidenceJob(Experiment, Data, Size, Inner, Outer, SetSeeds, Scoring):
    """Settings of one cell."""

    label_steps: int | None = whole(None, "outer steps of the row 'real + learned labels' (default: outer_steps)")
    judge_steps: int = whole(100, "steps of the head that judges sentences")
    sentence_steps: int = whole(60, "steps of the search for real sentences")
    sentences: int = whole(3000, "real sentences that the search chooses from")
    candidates: int = whole(64, "sentences that are judged per step")
    judges: tuple[str, ...] = option((), "students that judge searched keywords together (default: the student); one tokenizer")
    word_steps: int = whole(40, "steps of the search for keywords")
    word_candidates: int = whole(24, "changes of words that are judged per step")
    writer: str = option("offline:smollm2", "language model that writes sentences")
    written_candidates: int = whole(100, "sentences that it writes for each class")
    rank: int = whole(16, "rank of the row 'embeddings low rank'")
    published: dict[int, str] | None = option(None, "{per_class: file of published sets below $DISTILLKIT_DATA}, JSON lines of "
                                                    "set (a number), text and label (an index)")
    tuned_initialisations: int = whole(2, "initialisations that the recipe tuned tries each point of its grid on")
    tuned_rows: int = whole(300, "validation rows that it scores")
    full_seeds: Seeds = option((0, 1, 2), "fresh initialisations that are trained on the full data, the longest work")
    committed: str | None = option(None, "name of a committed result that committed_rows are taken from, not computed")
    committed_rows: tuple[str, ...] = option((), "which rows are taken from there")

    def seeds_of(self, row: str) -> tuple[int, ...]:
        """The seeds of the sets of a row: one where the bootstrap does not matter, none where this size has no such row."""
        method, recipe = row.split("/")
        method = method.removesuffix(TEACHER)
        once = recipe in ("corpus", "standard") and method != "embeddings" or row == f"{method}/tuned" and method in BY_HAND
        most = {"class names": 1, "written": written_per_class(self.corpus), FLOAT16: 1, LOW_RANK: 1}
        has_none = self.per_class not in (self.published or {}) if method == PUBLISHED else (
            self.per_class > most.get(method, self.per_class))
        if has_none:
            return ()
        return self.seeds[:1] if once else self.seeds


def written_sentences(corpus: str) -> list[list[str]]:
    """The sentences of each class that were written by hand for a corpus; none for other corpora."""
    sentences = read(WRITTEN)
    entry = sentences.get(corpus, {})
    return [*(sentences[entry] if isinstance(entry, str) else entry).values()]  # a name: those of that corpus


def written_per_class(corpus: str) -> int:
    """How many of them each class has."""
    return min(map(len, written_sentences(corpus)), default=0)


class BootstrapCell(ClassificationCell):
    """The sets of one seed, all from the same bootstrap; ``corpus`` is the task that it was drawn from."""

    corpus: Task
    encoder: Callable[[str], Student]
    texts = (CHOSEN, SEARCHED, CHOSEN_WRITTEN)
    selections = tuple(f"{method}{labels}" for method in (*CHEAP, PUBLISHED) for labels in ("", TEACHER))

    def score(self, method: str, recipe: str, seed: int) -> Scores:
        if method in UPPER:
            return self._upper_line(method, self.corpus if recipe == "corpus" else self.task, seed)
        if method == "full" and f"{method}/{recipe}" not in self.job.committed_rows:
            return self.evaluated(None, recipe, self.job.full_seeds, task=self.corpus)
        scores, note = super().score(method, recipe, seed)
        if method in (FLOAT16, LOW_RANK):
            scores = [score | {"nbytes": self._stored_bytes(method, seed)} for score in scores]
        return scores, note

    def evaluated(self, distilled: DistilledSet | None, recipe, *args, **options) -> Scores:
        job = self.job
        if recipe == "tuned":
            recipe = Tuned(job.tuned_grid, initialisations=job.tuned_initialisations, rows=job.tuned_rows)
        return super().evaluated(distilled, recipe, *args, **options)

    def learns_together(self, method: str) -> bool:
        return False  # all seeds are of one cell

    def _upper_line(self, method: str, task: Task, seed: int) -> Scores:
        begun = time.perf_counter()
        accuracy = tfidf_accuracy(task) if method == "tfidf" else linear_probe_accuracy(task, self.student)
        size = {"examples": len(task.train), "nbytes": sum(len(text.encode()) for text in task.train["text"])}
        return [{"init_seed": seed, "accuracy": rounded(accuracy), "seconds": rounded(time.perf_counter() - begun), **size}], {}

    def _stored_bytes(self, method: str, seed: int) -> int:
        learned = self.set_of("embeddings", seed)
        if method == FLOAT16:
            return set_bytes(learned, dtype="float16")
        return low_rank_bytes(learned, self.job.rank, dtype="float16")

    def _set_of(self, method: str, seed: int) -> DistilledSet:
        if method.endswith(TEACHER):
            return with_teacher_labels(self.set_of(method.removesuffix(TEACHER), seed), self.task)
        if method in (*BY_HAND, PUBLISHED):
            texts, labels = self._published(seed) if method == PUBLISHED else self._by_hand(method)
            return self._from_text(texts, [self.task.classes[label] for label in labels])
        if method == MODEL_WRITTEN:
            every = pd.DataFrame(self.set_of(CANDIDATES, seed).to_text()[:]).groupby("label").head(self.job.per_class)
            return self._from_text(every["text"], every["label"])
        if method == FLOAT16:
            return as_float16(self.set_of("embeddings", seed))
        if method == LOW_RANK:
            return low_rank(self.set_of("embeddings", seed), self.job.rank, dtype="float16")
        return super()._set_of(method, seed)

    def _from_text(self, texts: Iterable[str], labels: Iterable[str]) -> DistilledSet:
        return DistilledSet.from_text(texts, labels, self.task, self.student, length=self.job.length, soft_labels=False)

    def _candidates(self, seed: int) -> DistilledSet:
        """All sentences that the language model writes, as a set."""
        job = self.job
        writer = load_student(job.writer, questions(self.task), trainable="full")
        written = write_sentences(self.task, writer, per_class=job.written_candidates, length=job.length, seed=seed)
        self.notes[f"{CANDIDATES} {seed}"] = {name: getattr(written, name)
                                              for name in ("lines", "verbatim", "repeated", "overlap")}
        return self._from_text(written.texts, written.labels)

    def _by_hand(self, method: str) -> tuple[list[str], list[int]]:
        """The texts of the class names or of the written sentences, and their labels."""
        lines = [[name] for name in self.task.classes] if method == "class names" else written_sentences(self.job.corpus)
        pairs = [(text, label) for label, texts in enumerate(lines) for text in texts[: self.job.per_class]]
        return [text for text, _ in pairs], [label for _, label in pairs]

    def _published(self, number: int) -> tuple[list[str], list[int]]:
        """The texts of a published set, and their labels."""
        path = Path(os.environ.get("DISTILLKIT_DATA", ""), self.job.published[self.job.per_class])
        rows = pd.read_json(path, lines=True)
        rows = rows[rows["set"] == number]
        if rows.empty:
            raise FileNotFoundError(f"published: {path} has no set {number}; ask for other seeds")
        return rows["text"].tolist(), rows["label"].tolist()

    def create(self, method: str, seed: int) -> DistilledSet:
        if method == ATTENTION:
            return self.distil(method, seed, self.start(seed).with_attention(self.student), self.objective())
        if method == CANDIDATES:
            return self._candidates(seed)
        if method not in (CHOSEN, CHOSEN_WRITTEN, SEARCHED):
            return super().create(method, seed)
        job, begun = self.job, time.perf_counter()
        if method != SEARCHED:
            judge = FrozenJudge(self.task, self.student, steps=job.judge_steps)
            start, pool = ("herding", None) if method == CHOSEN else (MODEL_WRITTEN, self.set_of(CANDIDATES, seed))
            text = search_sentences(self.set_of(start, seed), self.task, self.student, judge, steps=job.sentence_steps,
                                    candidates=job.candidates, sentences=job.sentences, pool=pool, seed=seed)
        else:
            encoders = [self.encoder(source) for source in job.judges or (job.student,)]
            joint = JointJudge([FrozenJudge(self.task, encoder, **WORD_JUDGE, reads=part)
                                for encoder in encoders for part in READS])
            text = search_keywords(self.set_of("keywords", seed), self.task, self.student, joint, steps=job.word_steps,
                                   candidates=job.word_candidates, seed=seed)
        self.note(method, seed, [after for _, after in text.meta["search"]["losses"]], time.perf_counter() - begun)
        return text

    def note(self, name: str, seed: int, losses: Sequence[float], seconds: float, **more) -> None:
        super().note(name, seed, losses, seconds, outer_loss=round(float(np.mean(losses[-LAST:])), 5), **more)


class EvidenceCell(Cell):
    """One corpus and size; the sets of each seed belong to a :class:`BootstrapCell`, or to another ``seed_cell``."""

    seed_cell: ClassVar[type[BootstrapCell]] = BootstrapCell

    def __init__(self, *args):
        super().__init__(*args)
        self.of_seed, self.encoder = functools.cache(self._of_seed), functools.cache(self._encoder)

    def _of_seed(self, seed: int) -> BootstrapCell:
        cell = self.seed_cell(self.job, self.work, self.results, bootstrap(self.task, seed), self.student)
        cell.corpus, cell.notes, cell.deadline, cell.encoder = self.task, self.notes, self.deadline, self.encoder
        return cell

    def _encoder(self, source: str) -> Student:
        return self.student if source == self.job.student else load_student(source, self.task)

    def score(self, method: str, recipe: str, seed: int) -> Scores:
        return self.of_seed(seed).score(method, recipe, seed)

    def training_hash(self, method: str, recipe: str, seed: int) -> str | None:
        return self.of_seed(seed).training_hash(method, recipe, seed)

    def columns(self, method: str, recipe: str) -> dict:
        return super().columns("full" if method in UPPER else method, recipe) | {"method": method}


@settings(kind="evidence")
class EvidenceGrid(Grid):
    """Settings of an experiment: one corpus at several sizes."""

    per_class: tuple[int, ...] = filled(REQUIRED, "examples per class")

    cell_job, of_grid = EvidenceJob, (*Grid.of_grid, "per_class")

    def variations(self) -> dict[str, Mapping]:
        """What each cell has besides the base."""
        return {f"per_class={k}": {"per_class": k} for k in self.per_class}


# --- the table -----------------------------------------------------------------------------------------------------------


def evidence_table(result: Mapping, against: str | None = None) -> str:
    """The result as a Markdown table, with gains over the best cheap opponent of each size and the screening losses below.

    Intervals are corrected for their number in the table (Bonferroni).

    Args:
        against: the row to take gains over, in place of the best cheap one.

    Raises:
        ValueError: the result has no such row.
    """
    sets_of = {k: by_set(result, cell=f"per_class={k}") for k in result["config"]["per_class"]}
    rivals = {k: best_cheap(sets) for k, sets in sets_of.items()}
    if against is not None:
        check_choice("against", against, result["config"]["rows"])
        rivals = {k: against if sets.loc[against].notna().any() else None for k, sets in sets_of.items()}
    compared = {k: [row for row in sets.dropna(how="all").index if _compared(row) and row != rivals[k]] if rivals[k] else []
                for k, sets in sets_of.items()}
    paired = {k: by_hand_everywhere(sets) for k, sets in sets_of.items()}
    comparisons = max(1, sum(has_interval(paired[k], row, rivals[k]) for k, rows in compared.items() for row in rows))
    lines, scores = [], frame(result)
    for k, sets in sets_of.items():
        of_cell = scores[scores["cell"] == f"per_class={k}"]
        for row in sets.dropna(how="all").index:
            described = _described(of_cell[of_cell["row"] == row], result["cells"][f"per_class={k}"])
            lines.append([str(k), *described, gain(paired[k], row, rivals[k], comparisons) if row in compared[k] else ""])
    heads = ["per class", "method", "recipe", "bytes", "of the compressed corpus", "accuracy, mean ± sd over sets",
             f"gain over {against or 'the best cheap text'}"]
    opponents = ", ".join(f"{rival} ({k} per class)" for k, rival in rivals.items() if rival)
    role = "Opponent" if against else "Best cheap text"
    note = (f"Gains are paired by set; their 95 % intervals are {corrected(comparisons)}. "
            f"{role}: {opponents or 'not run'}.{_corpus_size(result)}{_screening(result, sets_of)}")
    return f"{markdown(heads, lines, 'rll')}\n\n{note}"


def best_cheap(sets: pd.DataFrame) -> str | None:
    """The cheap row with the highest mean over sets; None where none has run."""
    means = sets.mean(axis=1).dropna()
    cheap = [row for row in means.index if row.split("/")[0].removesuffix(TEACHER) in CHEAP]
    return str(means[cheap].idxmax()) if cheap else None


def _compared(row: str) -> bool:
    method = row.split("/")[0].removesuffix(TEACHER)
    return method not in (*CHEAP, *UPPER, "full")


def by_hand_everywhere(sets: pd.DataFrame) -> pd.DataFrame:
    """The scores, with those of texts without drawn rows at every set seed, as they are the same for each."""
    by_hand = sets.index.str.split("/").str[0].isin(BY_HAND)
    everywhere = sets.copy()
    everywhere.loc[by_hand] = sets.loc[by_hand].ffill(axis=1).bfill(axis=1)
    return everywhere


def _described(of_row: pd.DataFrame, cell: Mapping) -> list[str | None]:
    """Method, recipe, bytes and their share of the compressed corpus, and the score of a row's students."""
    first = of_row.iloc[0]
    method, mark = str(first["method"]), ""
    if isinstance(first.get("same_set_as"), str):
        mark = f" (the sentences of {first['same_set_as'].split(': ')[1].split('/')[0]})"
    if isinstance(first.get("committed"), str):
        mark = f" (committed, {first['committed']})"
    share = None if method in UPPER or method == "full" else of_the_corpus(first["nbytes"], cell)
    of_sets = of_row.groupby("set_seed")["accuracy"].mean()
    inits = of_row["init_seed"].nunique()
    counts = f"{len(of_sets)} set{'s' * (len(of_sets) > 1)}" + f", {inits} initialisations" * (inits > 1)
    return [method + mark, first["recipe"], number(first["nbytes"], ",.0f"), share, f"{spread(of_sets)} ({counts})"]


def _corpus_size(result: Mapping) -> str:
    sizes = [cell["training_text"] for cell in result["cells"].values()]
    return f" The corpus has {sizes[0]['bytes']:,} bytes, {sizes[0]['compressed']:,} under xz." if sizes else ""


def _screening(result: Mapping, sets_of: Mapping[int, pd.DataFrame]) -> str:
    """Rank correlations over sets of a method's outer loss with its students' error on test, where there are five sets."""
    found = []
    for k, sets in sets_of.items():
        notes = result["cells"].get(f"per_class={k}", {"notes": {}})["notes"]
        for row in sets.dropna(how="all").index:
            method = row.split("/")[0]
            losses = pd.Series({seed: notes[f"{method} {seed}"]["outer_loss"] for seed in sets.columns
                                if "outer_loss" in notes.get(f"{method} {seed}", {})}, dtype=float)
            correlation = rank_correlation(losses, 1 - sets.loc[row])
            if correlation is not None:
                found.append(f"{row} at {k} per class {correlation:+.2f}")
    return f" Rank correlation over sets of outer loss and test error: {', '.join(found)}." if found else ""
