"""Sentences that a language model writes, as candidates for distilled text that is nobody's sentence.

DiLM (Maekawa et al., 2024) trains a language model to write a distilled set.  Here a pretrained one only continues a list: it
reads the name of a class and a few of its training rows, a line each, and writes the next line.  A judge then chooses among
the lines as it does among real sentences (:func:`~distillkit.text.sentences.search_sentences` with ``pool``).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

import torch

from distillkit.core.student import Student
from distillkit.data.tasks import Task
from distillkit.io.checks import check_are, check_number, check_whole, check_wholes, require
from distillkit.io.progress import progress
from distillkit.io.seeds import derive_seed, generator

RUN = 8  # words in a row that a written sentence and a training row are said to share
FEWEST_WORDS = 3  # of a sentence
PATIENCE = 4  # lines that may be written for each sentence that is asked for


@dataclasses.dataclass(frozen=True)
class WrittenSentences:
    """What a language model wrote for each class.

    Attributes:
        texts: the sentences, class by class.
        labels: the name of each one's class.
        lines: how many lines were written in all, those that were left out included.
        verbatim, repeated: share of the lines that were left out because they begin a training row word for word, or because
            the same line had been written before.
        overlap: share of ``texts`` with eight words in a row that stand in a training row.
    """

    texts: tuple[str, ...] = dataclasses.field(repr=False)
    labels: tuple[str, ...] = dataclasses.field(repr=False)
    lines: int
    verbatim: float
    repeated: float
    overlap: float


def write_sentences(
    task: Task, writer: Student, *, per_class: int = 100, shown: int = 5, length: int = 32, temperature: float = 0.8,
    top_p: float = 0.95, batch_size: int = 16, seed: int = 0,
) -> WrittenSentences:
    """Have a language model write sentences of each class of a classification task.

    Args:
        task: whose training rows are shown to the writer; no other split is read.
        writer: a language model, loaded for ``questions(task)``; a chat model continues the list as plain text.
        per_class: sentences of each class.
        shown: training rows in a prompt, drawn anew for each batch and cut to ``length`` tokens.
        length: tokens of a sentence, at most.
        temperature, top_p: of nucleus sampling (Holtzman et al., 2020).
        batch_size: sentences written after one prompt.
        seed: draws the rows that are shown, and the tokens.

    Raises:
        ValueError: a task without classes, a student that is no language model, or a writer that writes too few new sentences
            of a class in four times as many lines.
    """
    check_are(task=(task, Task), writer=(writer, Student))
    check_wholes(per_class=per_class, shown=shown, length=length, batch_size=batch_size)
    check_number("temperature", temperature, without="least")
    check_number("top_p", top_p, most=1, without="least")
    check_whole("seed", seed, least=0)
    require(task.kind == "classification", f"task {task.name!r} has no classes to write sentences of")
    require(writer.kind == "instruction", f"student {writer.name!r} is no language model; load one, "
            "load_student(…, dk.questions(task))")
    known = [" ".join(words_of(text)) for text in task.train["text"][:]]
    rows_of, texts, labels = task.rows_by_class("train"), [], []
    counts = {"lines": 0, "verbatim": 0, "repeated": 0}
    sampling = {"max_new_tokens": length, "temperature": temperature, "top_p": top_p, "num_return_sequences": batch_size}
    for label, name in enumerate(task.classes):
        new: dict[str, str] = {}
        bar = progress(range(PATIENCE * -(-per_class // batch_size)), desc=f"writing {name}", unit="batch")
        for batch in bar:
            draw = generator("sentences-shown", seed, label, batch)
            rows = rows_of[label][torch.randperm(len(rows_of[label]), generator=draw)[:shown].numpy()]
            prompt = list_of(name, [task.train[int(row)]["text"] for row in rows], writer.tokenizer, length)
            for line in continuations(writer, prompt, derive_seed("sentences-written", seed, label, batch), **sampling):
                text = " ".join(words_of(line))
                counts["lines"] += 1
                if text.count(" ") < FEWEST_WORDS - 1:  # too short for a sentence, and no copy of one
                    continue
                verbatim = any(row.startswith(text) for row in known)
                counts["verbatim"] += verbatim
                counts["repeated"] += not verbatim and text in new
                if not verbatim:
                    new.setdefault(text, line)
            if len(new) >= per_class:
                bar.close()
                break
        require(len(new) >= per_class, f"writer {writer.name!r} wrote {len(new)} new sentences of class {name!r} in "
                f"{PATIENCE} × {per_class} lines, and {per_class} were asked for; ask for fewer, or raise temperature")
        texts += [*new.values()][:per_class]
        labels += [name] * per_class
    in_rows = {run for row in known for run in runs(row.split(), RUN)}
    shared = sum(not in_rows.isdisjoint(runs(words_of(text), RUN)) for text in texts)
    return WrittenSentences(tuple(texts), tuple(labels), counts["lines"], counts["verbatim"] / counts["lines"],
                            counts["repeated"] / counts["lines"], shared / len(texts))


def list_of(name: str, texts: list[str], tokenizer, length: int) -> str:
    """The beginning of a list of sentences of a class, each cut to ``length`` tokens, for a language model to go on with."""
    lines = (tokenizer.decode(tokenizer(" ".join(text.split()), add_special_tokens=False)["input_ids"][:length])
             for text in texts)
    return "".join((f"Texts of the class {name!r}, one per line.\n\n", *(f"- {line}\n" for line in lines), "-"))


def continuations(writer: Student, prompt: str, seed: int, **sampling) -> Iterator[str]:
    """The first line of each of several continuations of a prompt, as text without white space at its ends."""
    tokenizer = writer.tokenizer
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=writer.device)
    with torch.random.fork_rng(), torch.no_grad():  # transformers draws from the global generator
        torch.manual_seed(seed)
        written = writer.module.eval().generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, stop_strings="\n", tokenizer=tokenizer,
            pad_token_id=tokenizer.eos_token_id, **sampling)
    for text in tokenizer.batch_decode(written[:, ids.shape[1]:], skip_special_tokens=True):
        yield text.partition("\n")[0].strip()


def words_of(text: str) -> list[str]:
    """The words of a text in lower case: runs of letters, digits and underscores."""
    return re.findall(r"\w+", text.casefold())


def runs(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of ``n`` words in a row."""
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
