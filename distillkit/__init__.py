"""distillkit: learn a few synthetic examples that train a text model in a few steps.

    import distillkit as dk

    task = dk.load_task("docstrings")
    student = dk.load_student("offline:minilm", task)
    start = dk.DistilledSet.from_real(task, student, per_class=1)
    distiller = dk.Distiller(start, dk.BPTT(task, student, dk.Unroll(steps=4)))
    for record in distiller.run(200):
        print(record.loss)
    print(dk.evaluate(distiller.distilled, task, student))

Names are imported when first used, so that ``import distillkit`` itself is quick.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_HOMES = {
    "distilled": ("DistilledSet",),
    "distiller": ("Distiller", "StepRecord"),
    "evaluation": ("Evaluation", "evaluate"),
    "experts": ("Experts", "record_experts"),
    "influence": ("LessSettings",),
    "inner": ("SGD", "AdamW", "Momentum", "Unroll"),
    "instruction": ("InstructionTask",),
    "metagrad": (
        "ForwardDifference", "MetaGradient", "Replay", "StoreAll", "Truncated", "recommend",
    ),
    "neighbors": ("NeighborLoss", "nearest_tokens", "project"),
    "objectives": ("BPTT", "TrajectoryMatching", "meta_gradient", "search_step_size"),
    "prompting": ("FewShot", "few_shot", "questions"),
    "scale": ("settings",),
    "seeds": ("derive_seed",),
    "selection": ("select",),
    "storage": ("StorageError",),
    "students": ("Student", "load_student"),
    "tasks": ("Task", "load_task"),
    "judges": ("FrozenJudge", "StudentJudge"),
    "text": (
        "SwapSearch", "ThroughProjection", "corpus_tokens", "nearest_sentences", "relabel", "relax_tokens", "search_sentences",
    ),
    "wording": ("Wording", "describe_text", "wording_table"),
    "other_models": ("retokenize", "transfer"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module 'distillkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"distillkit.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return __all__
