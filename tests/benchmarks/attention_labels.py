"""Attention labels: the CPU seconds to an accuracy, of their authors' algorithm and of the kit's, with one model and corpus.

    DISTILLKIT_DATA=folder python tests/benchmarks/attention_labels.py             # 5 sets of each, one thread
    DISTILLKIT_DATA=folder python tests/benchmarks/attention_labels.py --ways published --sets 0 \\
        --settings '{"rate": 0.1}' --settings '{"rate": 0.01}'                     # how a rate is chosen
    python tests/benchmarks/attention_labels.py --readme                           # write RESULTS.md's table from the JSON

Maekawa et al. (ACL 2023, "Dataset Distillation with Attention Labels for Fine-tuning BERT") learn inputs, labels, a step size
for each inner step, and labels for the attention of the first token.  :class:`Published` is their algorithm, written here
from its description, not their code:

* inputs ``[m, l, d]`` and attention logits ``[m, layers, heads, l]`` start from N(0, 1); labels start one-hot and are any real
  numbers, y in −Σ y log p; the step size is the softplus of a learned number, 0.1 or 0.01 at first;
* the inner loss is the task's plus KL(label ‖ attention of the first token), summed over positions, mean over the rest;
* all examples at each of T steps of SGD, exact differentiation through them, a fresh head in each outer step, no dropout;
* AdamW without weight decay, one rate for everything, linear warm-up over a tenth of the steps and linear decay, gradients
  clipped at norm 1 over all learned tensors together, real batches of 32.

:class:`Kit` is a :class:`~distillkit.core.distiller.Distiller` of keywords with attention labels.

Set seed s selects a bootstrap of the training rows, and draws whatever a way starts from.  Both ways are scored at the same
outer steps: the checkpoint with the lowest validation loss so far is trained from the same fresh initialisations, and its
accuracy on the validation rows is their mean.  Seconds are of the processor: loading everything and all outer steps, without
the scoring.  A run ends when both accuracies are reached.  Runs that the result holds already are not made again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import distillkit as dk
from distillkit.core.problem import leaf
from distillkit.data.tasks import bootstrap
from distillkit.evaluation.recipes import Own
from distillkit.experiments.results import environment, markdown, read, with_tables, write
from distillkit.io.seeds import derive_seed, generator

FIGURES = Path(__file__).resolve().parents[2] / "figures"
RESULT = FIGURES / "results" / "attention_labels.json"
LIMIT = {"train": 4000, "validation": 300, "test": 1000}
LENGTH = 32
SCORED = (5, 10, 15, 20, 30, 40, 60, 80, 100, 130, 160, 200, 250, 300)
ACCURACIES = (0.70, 0.80)
INITIALISATIONS = (0, 1, 2)


class Published:
    """The authors' algorithm, as the module says.

    Args:
        steps: T inner steps.
        rate: of AdamW.
        first_size: the step size at the start.
        total: outer steps that the schedule is for.
    """

    def __init__(self, task: dk.Task, student: dk.Student, seed: int, total: int = 100, *, steps: int = 1, rate: float = 0.01,
                 first_size: float = 0.1):
        self.task, self.student, self.seed, self.total = task, student, seed, total
        config = student.module.config
        draw, m = generator("published-start", seed), len(task.classes)
        self.embeds = torch.randn(m, LENGTH, student.width, generator=draw)
        self.attention = torch.randn(m, config.num_hidden_layers, config.num_attention_heads, LENGTH, generator=draw)
        self.labels = torch.eye(m)
        self.raw_sizes = torch.full((steps,), first_size).expm1().log()
        self.learned = [tensor.requires_grad_() for tensor in (self.embeds, self.attention, self.labels, self.raw_sizes)]
        self.optimizer = torch.optim.AdamW(self.learned, lr=rate, weight_decay=0)
        warm = max(1, total // 10)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min((step + 1) / warm, max(0.0, (total - step) / (total - warm))))

    def steps(self) -> Iterator[None]:
        """One outer step after the other."""
        rows_of, n = generator("published-batches", self.seed), len(self.task.train)
        for step in range(self.total):
            rows = torch.randint(n, (32,), generator=rows_of)
            batch = self.task.batch(self.student.tokenizer, "train", rows)
            params = self.student.init(derive_seed("published-init", self.seed, step))
            loss = self.student.loss(self.trained(params, differentiable=True), batch, batch["labels"])
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.learned, 1.0)
            self.optimizer.step()
            self.schedule.step()
            yield

    def trained(self, params: dict[str, Tensor], *, differentiable: bool = False) -> dict[str, Tensor]:
        """The parameters after T steps on the set."""
        params = {name: leaf(value) for name, value in params.items()}
        for size in torch.nn.functional.softplus(self.raw_sizes):
            grads = torch.autograd.grad(self.inner_loss(params), [*params.values()], create_graph=differentiable,
                                        allow_unused=True, materialize_grads=True)
            params = {name: p - size * g for (name, p), g in zip(params.items(), grads, strict=True)}
        return params

    def inner_loss(self, params: dict[str, Tensor]) -> Tensor:
        """The task's loss and that of the attention labels."""
        inputs = {"inputs_embeds": self.embeds, "attention_mask": torch.ones(self.embeds.shape[:2], dtype=torch.bool)}
        logits, attention = self.student.with_first_attention(params, inputs)
        target = self.attention.log_softmax(-1)
        divergence = (target.exp() * (target - attention.log())).sum(-1).mean()
        return -(self.labels * logits.log_softmax(-1)).sum(-1).mean() + divergence

    def checkpoint(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self.learned]

    def trained_from(self, checkpoint: list[Tensor], seed: int) -> dict[str, Tensor]:
        """A fresh student's parameters after training on a checkpoint."""
        copy = object.__new__(Published)
        copy.student = self.student
        copy.embeds, copy.attention, copy.labels, copy.raw_sizes = checkpoint
        return copy.trained(self.student.init(seed))


class Kit:
    """A distiller of a line of keywords for each class, or of a real sentence, with attention labels.

    Args:
        total: outer steps that the schedule is for; the run ends with them.
        steps, size: T inner steps, and the step size at the start.
        rate, attention_rate, size_rate: outer learning rates.
        batch: real rows per outer step.
        clip: as the distiller takes it.
        attention: whether there are attention labels.
        start: ``"keywords"``, or another selection.
    """

    def __init__(self, task: dk.Task, student: dk.Student, seed: int, total: int = 60, *, steps: int = 3, size: float = 0.2,
                 rate: float = 0.03, attention_rate: float = 0.1, size_rate: float = 0.02, batch: int = 32,
                 clip: float | None = 2.0, attention: bool = True, start: str = "keywords"):
        self.task, self.student, self.total = task, student, total
        selected = dk.select(task, student, start, per_class=1, length=LENGTH, seed=seed).soften()
        objective = dk.BPTT(task, student, dk.Unroll(steps, optimizer=dk.SGD(size)), batch_size=batch)
        self.distiller = dk.Distiller(selected.with_attention(student) if attention else selected, objective, lr=rate,
                                      attention_lr=attention_rate if attention else None, step_size_lr=size_rate, clip=clip,
                                      seed=seed)

    def steps(self) -> Iterator[None]:
        """One outer step after the other."""
        for _ in self.distiller.run(self.total):
            yield

    def checkpoint(self) -> dk.DistilledSet:
        return self.distiller.distilled

    def trained_from(self, checkpoint: dk.DistilledSet, seed: int) -> dict[str, Tensor]:
        """A fresh student's parameters after training on a checkpoint."""
        plan = Own().plan(checkpoint, self.task, self.student)(seed)
        *_, params = plan.train(self.student, self.student.init(seed))
        return params


WAYS = {"published": Published, "kit": Kit}


@torch.no_grad()
def validated(way: Published | Kit, checkpoint, seeds=INITIALISATIONS, split: str = "validation") -> tuple[float, float]:
    """Mean loss and mean accuracy of fresh students trained on a checkpoint."""
    losses, accuracies = [], []
    for seed in seeds:
        with torch.enable_grad():
            params = {name: p.detach() for name, p in way.trained_from(checkpoint, derive_seed("validate", seed)).items()}
        lengths = np.array([len(ids) for ids in way.task.token_ids(way.student.tokenizer, split)])
        for rows in np.array_split(lengths.argsort(), -(-len(lengths) // 100)):
            batch = way.task.batch(way.student.tokenizer, split, rows)
            logits = way.student.logits(params, batch)
            losses += torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none").tolist()
            accuracies += (logits.argmax(-1) == batch["labels"]).tolist()
    return float(np.mean(losses)), float(np.mean(accuracies))


def timed(name: str, task, student, seed: int, set_up: float, settings: dict, stop: int | None = None) -> dict:
    """One set: the score at each scored step, and the CPU seconds at which each accuracy was reached (None: not)."""
    begun, scoring, best, scores = time.process_time(), 0.0, (float("inf"), 0.0), []
    way = WAYS[name](bootstrap(task, seed), student, seed, **settings)
    reached: dict[str, float | None] = {f"{accuracy:.2f}": None for accuracy in ACCURACIES}
    for step, _ in enumerate(way.steps(), 1):
        if step in SCORED:
            paused = time.process_time()
            seconds = set_up + paused - begun - scoring
            best = min(best, validated(way, way.checkpoint()))
            scoring += time.process_time() - paused
            loss, accuracy = (round(value, 4) for value in best)
            scores.append({"step": step, "seconds": round(seconds, 1), "loss": loss, "accuracy": accuracy})
            print(name, settings, f"set {seed}", scores[-1], flush=True)
            reached |= {a: round(seconds, 1) for a, at in reached.items() if at is None and best[1] >= float(a)}
        if step == stop or None not in reached.values():
            break
    return {"way": name, "settings": settings, "set": seed, "reached": reached, "scores": scores}


def table(result: dict) -> str:
    """CPU seconds to each accuracy, set by set, as a Markdown table."""
    runs = pd.DataFrame(result["runs"])
    runs["settings"] = runs["settings"].map(lambda settings: ", ".join(f"{k} {v}" for k, v in settings.items()) or "defaults")
    lines = []
    for (way, settings), of_way in runs.groupby(["way", "settings"], sort=False):
        last = [run[-1]["accuracy"] for run in of_way["scores"]]
        reached = [", ".join(_seconds(run[accuracy], scores[-1]["seconds"])
                             for run, scores in zip(of_way["reached"], of_way["scores"], strict=True))
                   for accuracy in (f"{a:.2f}" for a in ACCURACIES)]
        end = f"{np.mean(last):.3f} ± {np.std(last, ddof=len(last) > 1):.3f}"
        lines.append([way, settings, *reached, end, str(len(of_way))])
    heads = ["way", "settings", *(f"CPU seconds to {a:.2f}" for a in ACCURACIES), "accuracy at the end", "sets"]
    return markdown(heads, lines, "ll")


def _seconds(reached: float | None, end: float) -> str:
    return f"{reached:.0f}" if reached is not None else f"not in {end:.0f}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["kit", "published"])
    parser.add_argument("--sets", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--settings", type=json.loads, action="append", help="of a way, as JSON; several are compared")
    parser.add_argument("--stop", type=int, help="outer steps after which a run is given up; default: those of its schedule")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--readme", action="store_true", help="measure nothing: write the table of figures/RESULTS.md")
    options = parser.parse_args(arguments)
    if options.readme:
        text = (FIGURES / "RESULTS.md").read_text(encoding="utf-8")
        drawn = with_tables(text, FIGURES / "results", marker="attention", draw=table)
        (FIGURES / "RESULTS.md").write_text(drawn, encoding="utf-8")
        return
    torch.set_num_threads(1)
    task = dk.load_task("ag_news", max_length=LENGTH, limit=LIMIT)
    student = dk.load_student("offline:minilm", task)
    set_up = time.process_time()
    runs = read(options.out)["runs"] if options.out.is_file() else []
    for seed, way, settings in itertools.product(options.sets, options.ways, options.settings or [{}]):
        if not any((run["way"], run["settings"], run["set"]) == (way, settings, seed) for run in runs):
            runs.append(timed(way, task, student, seed, set_up, settings, options.stop))
            write(options.out, environment() | {"initialisations": len(INITIALISATIONS), "runs": runs})
    print(table({"runs": runs}))


if __name__ == "__main__":
    main()
