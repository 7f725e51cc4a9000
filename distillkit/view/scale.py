"""How big a lesson is: the one place where a notebook's models, corpora and budgets are written down.

A lesson has to run on a laptop without internet, where it is read and tested, and on a workstation, where it is worth
doing. Two copies of a notebook would drift apart, so there is one, which asks here::

    cfg = settings("01_classification_bptt")

and the environment variable DISTILLKIT_SCALE says which row of the table it gets: `cpu` (the default; nothing is
downloaded) or `gpu` (models and data from the hub, by name).

DISTILLKIT_REDUCED=1 cuts every budget to the least that still runs each line of code. That is how the tests execute the
gpu rows against a stand-in hub of random weights, where everything works and nothing is learned. So a lesson states
what it claims about *learning* through `Settings.claim`, which a reduced run does not hold it to, and everything else
with `assert`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from typing import ClassVar

SCALES = ("cpu", "gpu")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What one notebook runs with at one scale.

    Args:
        corpus: what `load_task` is given.
        corpus_limit: rows per split, or None for all of them.
        student: what `load_student` is given.
        unroll_steps: T, the inner steps of one training run on the synthetic examples.
        outer_steps: updates of the synthetic examples.
        outer_batch: real examples in one outer loss.
        max_length: tokens that a real text is cut to.
        seeds: the seeds that sets are scored with; two at least, or there is no spread to report.
        notebook, scale, reduced: filled in by `settings`.

    Raises ValueError, with the field and the value, for a value outside its range.
    """

    # The largest budget of a reduced run.
    LEAST: ClassVar[dict[str, int]] = {
        "corpus_limit": 96, "max_length": 16, "unroll_steps": 2, "outer_steps": 2, "outer_batch": 8,
    }

    corpus: str
    student: str
    unroll_steps: int
    outer_steps: int
    outer_batch: int
    max_length: int
    corpus_limit: int | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    notebook: str = ""
    scale: str = "cpu"
    reduced: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            counted = field.type == "int" or (field.type == "int | None" and value is not None)
            if counted and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} must be an integer of at least 1, got {value!r}")
        if len(set(self.seeds)) != len(self.seeds) or len(self.seeds) < 2:
            raise ValueError(f"seeds must be two or more different integers, got {self.seeds!r}")

    def claim(self, condition: bool, text: str) -> None:
        """Assert what a lesson claims about learning, unless the budgets are reduced and nothing was learned.

        Args:
            condition: whether the claim holds here.
            text: the claim as a sentence, which is the message of the AssertionError when it does not.
        """
        if not (condition or self.reduced):
            raise AssertionError(f"{text} (this did not hold in {self.notebook}, scale {self.scale})")

    def sizes(self) -> str:
        """The sizes of what is learned, in words."""
        raise NotImplementedError

    def __str__(self) -> str:
        rows = "all rows" if self.corpus_limit is None else f"{self.corpus_limit} rows a split"
        return (
            f"{self.scale} scale{' (reduced)' if self.reduced else ''}: {self.student} on {self.corpus} ({rows}), "
            f"{self.sizes()}, {self.unroll_steps} inner steps, {self.outer_steps} outer steps, {len(self.seeds)} seeds"
        )


@dataclass(frozen=True, kw_only=True)
class ClassificationSettings(Settings):
    """Settings of a lesson on classification.

    Args:
        per_class: synthetic examples a class.
        length: tokens of a synthetic example, at most `max_length`.
    """

    LEAST: ClassVar[dict[str, int]] = Settings.LEAST | {"length": 12}

    per_class: int
    length: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length > self.max_length:
            raise ValueError(f"length must be at most max_length ({self.max_length}), got {self.length}")

    def sizes(self) -> str:
        return f"{self.per_class} synthetic example{'s' * (self.per_class > 1)} a class of {self.length} tokens"


@dataclass(frozen=True, kw_only=True)
class TextSettings(ClassificationSettings):
    """Settings of a lesson on ways to text.

    Args:
        swap_steps: steps of the search for words.
    """

    LEAST: ClassVar[dict[str, int]] = ClassificationSettings.LEAST | {"swap_steps": 2}

    swap_steps: int


@dataclass(frozen=True, kw_only=True)
class PromptingSettings(ClassificationSettings):
    """Settings of a lesson on few-shot prompts; the student is a language model.

    Args:
        rows: questions that are asked.
    """

    LEAST: ClassVar[dict[str, int]] = ClassificationSettings.LEAST | {"rows": 12}

    rows: int


@dataclass(frozen=True, kw_only=True)
class MergingSettings(ClassificationSettings):
    """Settings of a lesson on merging and streams of tasks.

    Args:
        trainable: which parameters train, as `load_student` is told.
        step_size: of the inner loop, where learned ones begin.
        stream_steps, stream_step_size: training on each task of the stream, with AdamW.
    """

    LEAST: ClassVar[dict[str, int]] = ClassificationSettings.LEAST | {"stream_steps": 2}

    trainable: str
    step_size: float
    stream_steps: int
    stream_step_size: float


@dataclass(frozen=True, kw_only=True)
class TransferSettings(ClassificationSettings):
    """Settings of a lesson on moving text to other models.

    Here the outer steps are those of a search for words, and the inner steps those of training on a text.

    Args:
        targets: students that read what was written on `student`; the first is pretrained.
        questions: an instruction corpus, of which at most `corpus_limit` rows a split are read.
        question_length: tokens that its prompts are cut to.
        languages: two language models whose tokenizers differ.
    """

    LEAST: ClassVar[dict[str, int]] = ClassificationSettings.LEAST | {"question_length": 48}

    targets: tuple[str, ...]
    questions: str
    question_length: int
    languages: tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class InstructionSettings(Settings):
    """Settings of a lesson on instruction tuning.

    Args:
        trainable: which parameters train, as `load_student` is told.
        fraction: size of a set, as a share of the training split.
        batch_size: examples of the set in an inner step.
        expert_epochs, expert_batch, expert_step_size, snapshots_per_epoch: of the expert.
        eps_root: ε inside the root of AdamW, as large as the squares of typical gradients.
    """

    LEAST: ClassVar[dict[str, int]] = Settings.LEAST | {
        "max_length": 48, "expert_epochs": 1, "expert_batch": 16, "snapshots_per_epoch": 2, "batch_size": 4,
    }

    trainable: str
    fraction: float
    batch_size: int
    expert_epochs: int
    expert_batch: int
    expert_step_size: float
    snapshots_per_epoch: int
    eps_root: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must lie above 0 and at most at 1, got {self.fraction!r}")

    def sizes(self) -> str:
        return f"{self.fraction:.0%} synthetic examples, trained: {self.trainable}"


_CPU = ClassificationSettings(
    corpus="docstrings",
    corpus_limit=600,  # scoring is most of a short lesson
    student="offline:minilm",
    per_class=1,
    length=32,
    unroll_steps=3,
    outer_steps=20,
    outer_batch=32,
    max_length=32,
    seeds=(0, 1, 2),
)
_GPU = ClassificationSettings(
    corpus="ag_news",
    student="bert-base-uncased",
    per_class=1,
    length=64,
    unroll_steps=8,
    outer_steps=1000,
    outer_batch=128,
    max_length=64,
    seeds=(0, 1, 2, 3, 4),
)

TABLE: dict[str, dict[str, Settings]] = {
    "00_quickstart": {"cpu": _CPU, "gpu": _GPU},
    "01_classification_bptt": {"cpu": replace(_CPU, seeds=(0, 1)), "gpu": replace(_GPU, corpus="rotten_tomatoes")},
    "02_instruction_trajectory_matching": {
        "cpu": InstructionSettings(
            corpus="docstrings_qa:library",
            corpus_limit=600,
            student="offline:tiny-opt",
            trainable="full",
            max_length=96,
            fraction=0.1,
            unroll_steps=4,
            batch_size=15,
            outer_steps=8,
            outer_batch=32,
            expert_epochs=2,
            expert_batch=32,
            expert_step_size=5e-4,
            snapshots_per_epoch=2,
            eps_root=1e-4,
        ),
        "gpu": InstructionSettings(
            corpus="arc_easy",
            student="facebook/opt-1.3b",
            trainable="lora",
            max_length=128,
            fraction=0.05,
            unroll_steps=8,
            batch_size=14,
            outer_steps=200,
            outer_batch=32,
            expert_epochs=2,
            expert_batch=32,
            expert_step_size=1e-3,
            snapshots_per_epoch=2,
            eps_root=1e-8,
        ),
    },
    "03_from_embeddings_to_text": {
        "cpu": TextSettings(
            corpus="docstrings",
            corpus_limit=1000,
            student="offline:minilm",
            per_class=1,
            length=32,
            max_length=32,
            unroll_steps=3,
            outer_steps=6,
            outer_batch=48,
            swap_steps=20,
            seeds=(0, 1),
        ),
        "gpu": TextSettings(
            corpus="rotten_tomatoes",
            student="bert-base-uncased",
            per_class=1,
            length=64,
            max_length=64,
            unroll_steps=8,
            outer_steps=100,
            outer_batch=128,
            swap_steps=200,
            seeds=(0, 1, 2, 3, 4),
        ),
    },
    "04_cross_architecture_transfer": {
        "cpu": TransferSettings(
            corpus="docstrings",
            corpus_limit=400,
            student="offline:minilm",
            targets=("offline:distil-minilm", "offline:small-bert"),
            questions="docstrings_qa:library",
            question_length=96,
            languages=("offline:tiny-opt", "offline:tiny-llama"),
            per_class=1,
            length=32,
            max_length=32,
            unroll_steps=20,
            outer_steps=12,
            outer_batch=400,
            seeds=(0, 1),
        ),
        "gpu": TransferSettings(
            corpus="rotten_tomatoes",
            student="bert-base-uncased",
            targets=("distilbert-base-uncased", "roberta-base"),
            questions="arc_easy",
            question_length=128,
            languages=("facebook/opt-1.3b", "meta-llama/Llama-3.2-1B"),
            per_class=1,
            length=64,
            max_length=64,
            unroll_steps=60,
            outer_steps=200,
            outer_batch=2048,
            seeds=(0, 1, 2, 3, 4),
        ),
    },
    "05_seeing_distilled_prompts": {
        "cpu": replace(_CPU, corpus_limit=300, outer_steps=10, outer_batch=32, seeds=(0, 1)),
        "gpu": replace(_GPU, outer_steps=200),
    },
    "06_few_shot_prompting": {
        "cpu": PromptingSettings(
            corpus="docstrings",
            student="offline:tiny-opt",
            per_class=1,
            length=20,
            max_length=32,
            unroll_steps=3,
            outer_steps=5,
            outer_batch=24,
            rows=100,
            seeds=(0, 1),
        ),
        "gpu": PromptingSettings(
            corpus="ag_news",
            student="gpt2",
            per_class=1,
            length=64,
            max_length=64,
            unroll_steps=8,
            outer_steps=200,
            outer_batch=64,
            rows=400,
            seeds=(0, 1, 2),
        ),
    },
    "07_scaling_and_compute": {  # all rows: the corpus itself is weighed, and nothing is scored
        "cpu": replace(_CPU, corpus_limit=None, outer_steps=2, outer_batch=48, seeds=(0, 1)), "gpu": _GPU,
    },
    "08_merging_and_continual_learning": {
        "cpu": MergingSettings(
            corpus="docstrings",
            corpus_limit=120,
            student="offline:minilm",
            trainable="head",
            step_size=1.0,
            per_class=1,
            length=12,
            max_length=20,
            unroll_steps=3,
            outer_steps=10,
            outer_batch=24,
            stream_steps=6,
            stream_step_size=1e-2,
            seeds=(0, 1),
        ),
        "gpu": MergingSettings(
            corpus="trec",
            student="bert-base-uncased",
            trainable="full",
            step_size=0.2,
            per_class=1,
            length=32,
            max_length=32,
            unroll_steps=8,
            outer_steps=300,
            outer_batch=64,
            stream_steps=100,
            stream_step_size=3e-4,
            seeds=(0, 1, 2),
        ),
    },
}


def settings(notebook: str, **overrides: object) -> Settings:
    """Return what `notebook` runs with at the scale that DISTILLKIT_SCALE names.

    Args:
        notebook: its file name without .ipynb, such as "00_quickstart".
        overrides: fields of its settings to change, as a reader does to try something out.

    Raises ValueError for a notebook that is not in the table, a scale other than cpu and gpu, a DISTILLKIT_REDUCED
    other than 0 and 1, an override that is no field, and a value outside its field's range. DISTILLKIT_REDUCED=1 has
    the last word over overrides too.
    """
    if not isinstance(notebook, str) or notebook not in TABLE:
        raise ValueError(f"no settings for a notebook {notebook!r}; distillkit/view/scale.py has {', '.join(TABLE)}")
    scale = _variable("DISTILLKIT_SCALE", SCALES)
    reduced = _variable("DISTILLKIT_REDUCED", ("0", "1")) == "1"
    known = {field.name for field in fields(TABLE[notebook][scale])} - {"notebook", "scale", "reduced"}
    unknown = sorted(overrides.keys() - known)
    if unknown:
        raise ValueError(f"settings have no field {', '.join(unknown)}; the fields are {', '.join(sorted(known))}")
    chosen = replace(TABLE[notebook][scale], notebook=notebook, scale=scale, **overrides)
    return _reduce(chosen) if reduced else chosen


def _variable(name: str, allowed: tuple[str, ...]) -> str:
    """Return the environment variable, or where it is unset or empty the first of the `allowed` values."""
    value = os.environ.get(name) or allowed[0]
    if value not in allowed:
        raise ValueError(f"the environment variable {name} must be {' or '.join(allowed)}, got {value!r}")
    return value


def _reduce(full: Settings) -> Settings:
    """Return `full` with the smallest budgets under which every line of a lesson still does something."""
    budgets = {name: min(getattr(full, name) or least, least) for name, least in full.LEAST.items()}
    return replace(full, **budgets, seeds=full.seeds[:2], reduced=True)
