"""The kinds of experiments by name: what describes one, what runs it, and the table that it is shown as."""

from collections.abc import Mapping
from functools import partial

from distillkit.experiments.any_recipe import AnyRecipeCell, AnyRecipeGrid, any_recipe_table
from distillkit.experiments.classification import (
    ClassificationCell,
    ClassificationJob,
    GridJob,
    scaling_table,
    slides_table,
    table,
)
from distillkit.experiments.continual import ContinualCell, ContinualJob, continual_table
from distillkit.experiments.encoders import encoders_table
from distillkit.experiments.evidence import EvidenceCell, EvidenceGrid, evidence_table
from distillkit.experiments.instruction import InstructionCell, InstructionJob, instruction_table
from distillkit.experiments.notebooks import notebooks_table
from distillkit.experiments.prompting import PromptingCell, PromptingJob, prompting_table
from distillkit.experiments.runner import Run
from distillkit.experiments.transfer import TransferCell, TransferJob, transfer_table
from distillkit.experiments.ways_to_text import TextCell, TextGridJob, TextJob, text_grid_table, text_table

KINDS = {  # kind: (settings, run(job, folder of results, folder of work, fresh=False), table(result))
    "classification": (ClassificationJob, partial(Run, ClassificationCell), table),
    "instruction": (InstructionJob, partial(Run, InstructionCell), instruction_table),
    "prompting": (PromptingJob, partial(Run, PromptingCell), prompting_table),
    "continual": (ContinualJob, partial(Run, ContinualCell), continual_table),
    "any_recipe": (AnyRecipeGrid, partial(Run, AnyRecipeCell), any_recipe_table),
    "evidence": (EvidenceGrid, partial(Run, EvidenceCell), evidence_table),
    "scaling": (GridJob, partial(Run, ClassificationCell), scaling_table),
    "slides": (GridJob, partial(Run, ClassificationCell), slides_table),
    "text": (TextJob, partial(Run, TextCell), text_table),
    "text_grid": (TextGridJob, partial(Run, TextCell), text_grid_table),
    "transfer": (TransferJob, partial(Run, TransferCell), transfer_table),
}


def table_of(*results: Mapping) -> str:
    """A result of any kind as Markdown; several of kind ``evidence`` side by side."""
    if len(results) > 1:
        return encoders_table(results)
    (result,) = results
    kind = result["config"].get("kind", "classification")
    if kind == "notebooks":  # it has no settings of its own to run
        return notebooks_table(result)
    *_, table = KINDS[kind]
    return table(result)
