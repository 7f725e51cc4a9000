"""The kinds of experiments by name: what describes one, what runs it, and the table that it is shown as."""

from distillkit.experiments.classification import ClassificationJob, ClassificationRun, table
from distillkit.experiments.continual import ContinualJob, ContinualRun, continual_table
from distillkit.experiments.grid import GridJob, GridRun, scaling_table, slides_table
from distillkit.experiments.instruction import InstructionJob, InstructionRun, instruction_table
from distillkit.experiments.prompting import PromptingJob, PromptingRun, prompting_table
from distillkit.experiments.text_grid import TextGridJob, text_grid_table
from distillkit.experiments.transfer import TransferJob, TransferRun, transfer_table
from distillkit.experiments.ways_to_text import TextJob, TextRun, text_table

KINDS = {  # kind: (settings, run(job, folder of results, folder of work), table(result))
    "classification": (ClassificationJob, ClassificationRun, table),
    "instruction": (InstructionJob, InstructionRun, instruction_table),
    "prompting": (PromptingJob, PromptingRun, prompting_table),
    "continual": (ContinualJob, ContinualRun, continual_table),
    "scaling": (GridJob, GridRun, scaling_table),
    "slides": (GridJob, GridRun, slides_table),
    "text": (TextJob, TextRun, text_table),
    "text_grid": (TextGridJob, GridRun, text_grid_table),
    "transfer": (TransferJob, TransferRun, transfer_table),
}
