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

from distillkit.io.version import __version__ as __version__

# The public names by the module that defines them, in the order in which a distillation uses them.
_HOMES = {
    # a corpus as a task, a model as a student
    "data.load": ("load_task",),
    "data.tasks": ("Task", "bootstrap"),
    "data.instruction": ("InstructionTask",),
    "core.loading": ("load_student",),
    "core.student": ("Student",),
    # the synthetic examples
    "core.distilled": ("DistilledSet",),
    # the inner loop: how a student trains
    "core.optimizers": ("SGD", "AdamW", "Momentum"),
    "core.inner": ("Unroll",),
    "core.mixture": ("CommonRecipes", "Mixture"),
    # how a gradient flows back through it
    "core.metagrad": ("ForwardDifference", "Replay", "StoreAll", "Truncated"),
    "core.problem": ("MetaGradient",),
    # the outer loop: the objective that a set is learned by, and its optimisation
    "core.objectives": ("BPTT", "TrajectoryMatching", "meta_gradient", "search_step_size"),
    "core.experts": ("Experts", "record_experts"),
    "core.distiller": ("Distiller", "StepRecord"),
    # which strategy suits a student, and what a distillation will cost
    "core.estimate": ("Estimate", "estimate", "recommend"),
    # scores of a set, and selected real examples to compare with
    "evaluation.evaluate": ("Evaluation", "evaluate"),
    "evaluation.recipes": ("Fixed", "Own", "Standard", "Tuned"),
    "evaluation.selection": ("select",),
    "evaluation.words": ("with_teacher_labels",),
    # from embeddings to words
    "text.projection": ("NeighborLoss", "ThroughProjection", "corpus_tokens", "nearest_tokens", "project", "relabel"),
    "text.judges": ("FrozenJudge", "JointJudge", "StudentJudge"),
    "text.swaps": ("SwapSearch",),
    "text.keywords": ("search_keywords",),
    "text.relaxed": ("relax_tokens",),
    "text.sentences": ("nearest_sentences", "search_pairs", "search_sentences"),
    "text.writing": ("WrittenSentences", "write_sentences"),
    # uses of a finished set: other models, prompts, a description of its text, publishing
    "applications.transfer": ("retokenize", "transfer"),
    "applications.prompting": ("FewShot", "few_shot", "questions"),
    "applications.wording": ("Wording", "describe_text", "wording_table"),
    "applications.publish": ("from_hub", "push_to_hub"),
    # errors of storage, seeds of random streams, sizes of the notebooks
    "io.storage": ("StorageError",),
    "io.seeds": ("derive_seed",),
    "view.lesson": ("sizes",),
    # looking at a set, or at the film of a distillation
    "view.lens.film": ("record_film",),
    "view.lens.lens": ("Lens",),
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
