"""Instruction tasks: prompts with responses, scored as text or as multiple choice.

A row is a *prompt*, a *response* that is trained on, and for scoring the *choices* that the response is one of: a model
answers with the choice it gives the highest likelihood. As the language model evaluation harness does, a prompt and what
continues it are tokenised together, with a space between, and what follows the prompt's own tokens is the continuation.
A prompt that is too long loses tokens in front, since the question stands at its end. Where two choices read the same,
either is right if one is. Rows without choices are scored by the likelihood of their response.

Rows of other projects are read as prompt and response: prompt with completion; instruction with input or context and
output or response (Alpaca, Dolly); and conversations, the last reply of which is the response (chat `messages`, ShareGPT).
"""

import hashlib
import json
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from distillkit.data.corpus import PROMPT_COLUMNS, SPLITS, Corpus, CorpusError, check_text, named, shown
from distillkit.data.labels import whole
from distillkit.data.tables import parse_json
from distillkit.data.tasks import CARVED, NO_TARGET, Task, complete, with_test_split
from distillkit.io.progress import progress
from distillkit.io.seeds import generator

ANSWER, GROUP = PROMPT_COLUMNS.index("answer"), PROMPT_COLUMNS.index("group")
CHUNK = 1000  # rows that are tokenised at once


@dataclass(frozen=True, eq=False, repr=False)
class InstructionTask(Task):
    """Three splits of prompts with responses. Make one with `load_task`.

    As `Task`, but: `kind` is "instruction" and `classes` is (). The `datasets.Dataset`s have the columns `prompt` and
    `response` (str), `choices` (list of str, empty where there are none), `answer` (int, an index into the choices, -1
    where there are none) and `group` (str: the kind of question, or the subject, "" where nothing says). `train` is None
    where MMLU comes without one; asking for its rows then raises `CorpusError`. `max_length` is for a prompt and the
    longest of its continuations together.
    """

    # Where choices are letters, and options of the prompt read the same: prompt and answer -> the places of all right choices.
    _also_right: dict[tuple[str, int], tuple[int, ...]] = field(default_factory=dict, repr=False)

    def rows_by_class(self, split: str) -> list[np.ndarray]:
        """One pool with the indices of all rows of that split, since there are no classes."""
        return [np.arange(len(self.split(split)))]

    def token_ids(self, tokenizer, split: str) -> list[list[int]]:
        """Each prompt of a split in tokens, with the special tokens in front and none behind.

        Cut from the left, special tokens spared, so that it fits into `max_length` with the longest continuation of its
        row. Where the tokenizer has a chat template, the prompt is the user's turn. Cached as long as `tokenizer` lives.
        """
        return self._tokens(tokenizer, split)[0]

    def response_ids(self, tokenizer, split: str) -> list[list[int]]:
        """Each response of a split in tokens, as it continues its prompt, with the end-of-text token if there is one."""
        return self._tokens(tokenizer, split)[1]

    def choice_ids(self, tokenizer, split: str, row: int) -> list[list[int]]:
        """Each choice of a row in tokens, as it continues the prompt; no end-of-text token. [] without choices."""
        return self._tokens(tokenizer, split)[2][row]

    def without_choices(self, split: str, rows: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Those of `rows` (default: all of the split) that have no choices, int64 [n]."""
        answers = np.asarray(self.split(split)["answer"][:])
        rows = np.arange(len(answers)) if rows is None else np.asarray(rows)
        return rows[answers[rows] < 0]

    def check_choices(self, split: str, rows: Sequence[int] | np.ndarray | None = None) -> None:
        """Raise `ValueError` unless each of `rows` (default: all of the split) has choices, which accuracy needs."""
        bare = self.without_choices(split, rows)
        if len(bare):
            raise ValueError(f"task {self.name!r}, split {split!r} has {len(bare)} rows without choices, such as row {bare[0]} "
                             "(counted from 0), and accuracy is measured on choices; add them, or call evaluate, which "
                             "then gives the loss of the responses")

    def are_right(self, split: str, rows: Sequence[int] | np.ndarray, picks: Sequence[int] | np.ndarray) -> np.ndarray:
        """Whether each of `picks`, a place among the choices of the row beside it, or -1, is right; bool [n].

        A choice that reads as the right one does is right as well.
        """
        columns, right = self.split(split)[[int(row) for row in rows]], []
        for pick, prompt, choices, answer in zip(picks, columns["prompt"], columns["choices"], columns["answer"]):
            same = pick >= 0 and choices[pick] == choices[answer]
            right.append(same or pick in self._also_right.get((prompt, answer), ()))
        return np.array(right, dtype=bool)

    def batch(self, tokenizer, split: str, rows: Sequence[int] | np.ndarray | Tensor) -> dict[str, Tensor]:
        """Rows as `input_ids` [b, l] and `attention_mask` [b, l], the prompts, and `labels` [b, r], the responses.

        All int64; prompts are padded right to the longest, responses with -100.
        """
        rows = [int(row) for row in rows]
        inputs, responses = self._inputs(tokenizer, split, rows), self.response_ids(tokenizer, split)
        labels = [torch.tensor(responses[row]) for row in rows]
        return inputs | {"labels": pad_sequence(labels, batch_first=True, padding_value=NO_TARGET)}

    def _tokens(self, tokenizer, split: str) -> tuple[list, list, list]:
        """The prompts, the responses and the choices of all rows in ids."""
        cache = self._token_ids.setdefault(tokenizer, {})
        if split not in cache:
            rows, ids = self.split(split), []
            for start in progress(range(0, len(rows), CHUNK), desc=f"tokenising {split}", leave=False):
                ids += self._tokenised(tokenizer, split, start, rows[start : start + CHUNK])
            cache[split] = tuple(map(list, zip(*ids)))
        return cache[split]

    def _tokenised(self, tokenizer, split: str, start: int, rows: dict[str, list]) -> Iterator[tuple[list, list, list]]:
        """(prompt, response, choices) in ids of each of `rows`, columns of the split from row `start` on."""
        mask = tokenizer("a", return_special_tokens_mask=True)
        front, chat = mask["input_ids"][: mask["special_tokens_mask"].index(0)], tokenizer.chat_template is not None
        prompts, space = ([_chat(tokenizer, prompt) for prompt in rows["prompt"]], "") if chat else (rows["prompt"], " ")
        texts = [[*choices, response] for choices, response in zip(rows["choices"], rows["response"])]
        heads = _ids(tokenizer, prompts if chat else [prompt.rstrip() for prompt in prompts])
        joined = iter(_ids(tokenizer, [prompt + space + text for prompt, row in zip(prompts, texts) for text in row]))
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        for number, (head, prompt, row) in enumerate(zip(heads, prompts, texts)):
            tails = [next(joined)[len(head) :] for _ in row]
            special = front if not chat or head[: len(front)] == front else []
            body = head[len(special) :] if chat else head
            room = self.max_length - len(special) - max(map(len, [*tails[:-1], tails[-1] + end]))
            where = f"{self.name}, split {split}, row {start + number} (counted from 0; {self.origin})"
            if room < 1:
                raise CorpusError(f"{where}: the longest of the response and the choices leaves no token of the prompt within "
                                  f"max_length={self.max_length}; use {self.max_length - room + 1} or more, or shorten it")
            if empty := [text for text, ids in zip([prompt, *row], [body, *tails]) if not ids]:
                raise CorpusError(f"{where}: this tokenizer makes no token of {empty[0][:40]!r}; drop the row or use another "
                                  "tokenizer")
            yield special + body[-room:], tails[-1] + end, tails[:-1]


def _chat(tokenizer, prompt: str) -> str:
    from jinja2 import TemplateError  # transformers renders with it, in a sandbox

    turn = [{"role": "user", "content": prompt}]
    try:
        return tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise ValueError("the tokenizer's chat template does not render a prompt "
                         f"({type(error).__name__}: {str(error)[:80]!r}); set tokenizer.chat_template = None to do without it"
                         ) from error


def _ids(tokenizer, texts: list[str]) -> list[list[int]]:
    """Texts in tokens of their own only, uncut."""
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def instruction_task(corpus: Corpus, *, max_length: int, limits: Mapping[str, int], seed: int) -> InstructionTask:
    """The task that a corpus of prompts makes; for the arguments see `load.load_task`.

    `limits` take as many rows of every group, as far as they go. Raises `CorpusError` for rows that cannot be used.
    """
    import datasets

    trainless = corpus.layout == "mmlu" and "train" not in corpus.splits
    corpus = with_test_split(corpus, needed=("test",) if trainless else ("train", "test"))
    also_right: dict[tuple[str, int], tuple[int, ...]] = {}

    def read(*columns, **further) -> tuple:
        *row, right = ROWS[corpus.layout](*columns, **further)
        if len(right) > 1:
            also_right[row[0], row[ANSWER]] = right
        return tuple(row)

    def held_out(train: list) -> list[int]:
        """Every tenth of the rows of a group, in random order."""
        order = torch.randperm(len(train), generator=generator("instruction-carve", seed)).tolist()
        return sorted(order, key=lambda row: train[row][GROUP])[:: round(1 / CARVED)]

    rows = {split: corpus.read_rows(split, read) for split in corpus.splits}
    if "validation" not in rows and len(rows.get("train", ())) < 2:
        raise CorpusError(f"{corpus.name} has no validation split and none can be made: a tenth of train is taken, and "
                          f"{'there is no train' if trainless else 'train has one row'}; add validation.jsonl")
    rows, origin = complete(corpus, rows, held_out, lambda row: row[GROUP], limits, seed)
    text = datasets.Value("string")
    features = datasets.Features(dict(zip(PROMPT_COLUMNS, (text, text, datasets.List(text), datasets.Value("int64"), text))))
    splits = dict.fromkeys(SPLITS)
    for split in rows:
        columns = dict(zip(PROMPT_COLUMNS, map(list, zip(*rows[split]))))
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    content = json.dumps(["instruction", *([split, rows.get(split)] for split in SPLITS)])
    return InstructionTask(corpus.name, "instruction", (), **splits, max_length=max_length,
                           fingerprint=hashlib.sha256(content.encode()).hexdigest(),
                           origin=origin + "; no training split" * trainless, _also_right=also_right)


# --- rows ------------------------------------------------------------------------------------------------------------


def _prompt_row(prompt, response, choices=None, answer=None, group=None) -> tuple:
    check_text(prompt, "prompt")
    check_text(response, "response")
    choices, group = _parsed(choices or []), _group(group)
    if choices == [] and answer in (None, "", -1, "-1"):
        return prompt, response, [], -1, group, ()
    choices = _two_or_more(choices)
    number = choices.index(response) if answer in (None, "") and response in choices else whole(answer)
    _check_answer(answer, number, choices)
    if response in choices and response != choices[number]:
        raise ValueError(f"the answer is {number}, the choice {shown(choices[number])}, but the response is the choice "
                         f"{shown(response)}; correct one of them")
    return prompt, response, choices, number, group, ()


def _arc_row(question, key, choices=None) -> tuple:
    check_text(question, "question")
    choices = _parsed(choices)
    if not isinstance(choices, dict) or not {"text", "label"} <= choices.keys():
        raise ValueError(f"the choices are {shown(choices)}; give a text and a label list")
    texts, keys = _two_or_more(choices["text"]), choices["label"]
    if not isinstance(keys, list) or len(keys) != len(texts) or len({*map(str, keys)}) < len(keys):
        raise ValueError(f"the labels of the choices are {shown(keys)}; give a different one for each of {len(texts)} choices")
    if key not in keys:
        raise ValueError(f"the answer key is {shown(key)}, which is none of the choices {named(keys)}; correct it")
    answer = keys.index(key)
    return f"Question: {question}\nAnswer:", texts[answer], texts, answer, "", ()


def _mmlu_row(question, answer, choices=None, subject=None) -> tuple:
    check_text(question, "question")
    choices, number = _two_or_more(choices), whole(answer)
    _check_answer(answer, number, choices)
    letters = list(string.ascii_uppercase[: len(choices)])
    lines = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices))
    right = tuple(place for place, choice in enumerate(choices) if choice == choices[number])
    return f"{question.strip()}\n{lines}\nAnswer:", letters[number], letters, number, _group(subject), right


def _instruction_row(instruction, response, input=None, context=None, system=None, category=None, history=None) -> tuple:
    """An instruction as the prompt, what a system is told above it, and below it what it is about."""
    check_text(instruction, "instruction")
    if not _is_blank(history):
        raise ValueError(f"the history is {shown(history)}; write the conversation as a list of messages")
    if not _is_blank(input) and not _is_blank(context):
        raise ValueError(f"there are an input and a context, {shown(input)} and {shown(context)}; leave one of them empty")
    return _prompt_row(_paragraphs(system, instruction, input, context), response, group=category)


ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "chatgpt": "assistant", "model": "assistant"}


def _chat_row(turns, _same_turns, system=None) -> tuple:
    """The last reply of a conversation as the response, and the turns before it as the prompt: the plain text where that is
    one turn (behind a system's), else each turn behind the name of who speaks."""
    turns = _parsed(turns)
    if isinstance(turns, dict) and all(isinstance(values, list) for values in turns.values()):
        turns = [dict(zip(turns, values)) for values in zip(*turns.values())]  # as the hub stores lists of objects
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"the conversation is {shown(turns)}; give a list of turns with role and content, or from and value")
    roles, texts = [], []
    for place, turn in enumerate(turns):
        turn = turn if isinstance(turn, dict) else {}
        roles.append(ROLES.get(str(turn.get("role", turn.get("from"))).lower()))
        texts.append(turn.get("content", turn.get("value")))
        if roles[-1] is None:
            raise ValueError(f"turn {place} (counted from 0) of the conversation is {shown(turns[place])}; give it a role of "
                             f"{', '.join(ROLES)} and a text")
        check_text(texts[-1], f"text of turn {place} (counted from 0)")
    if roles[-1] != "assistant" or "user" not in roles:
        raise ValueError(f"the conversation has the roles {named(roles)}; it must end with a reply of the "
                         "assistant to a user, so drop the row or its last turns")
    asked = roles[:-1]
    alone = sum(role != "system" for role in asked) == 1
    prompt = [text if alone or role == "system" else f"{role.title()}: {text}" for role, text in zip(asked, texts)]
    return _prompt_row(_paragraphs(system, *prompt), texts[-1])


# How a row asks and answers, by the layout of its corpus -> its prompt, response, choices, answer, group, and the places of
# all right choices where their texts do not tell. Raises ValueError for a row that cannot be used.
ROWS = {"prompts": _prompt_row, "arc": _arc_row, "mmlu": _mmlu_row, "instruction": _instruction_row, "chat": _chat_row}


def _check_answer(answer, number: int | None, choices: list) -> None:
    if number is None or not 0 <= number < len(choices):
        raise ValueError(f"the answer is {shown(answer)}, which is none of the {len(choices)} choices; number them from 0, or "
                         "leave the answer out where the response is a choice")


def _group(name) -> str:
    """The name of a row's group, a number as it is written, and "" where there is none."""
    if _is_blank(name):
        return ""
    check_text(name if isinstance(name, list | dict) else str(name), "group")
    return str(name)


def _is_blank(value) -> bool:
    return value is None or value == [] or isinstance(value, str) and value.strip() in ("", "[]")


def _paragraphs(*parts) -> str:
    """Those of `parts` that are not blank, with an empty line between."""
    parts = [part for part in parts if not _is_blank(part)]
    for part in parts:
        check_text(part, "input or the context")
    return "\n\n".join(parts)


def _two_or_more(choices) -> list:
    choices = _parsed(choices)
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(f"the choices are {shown(choices)}; give a list of two or more")
    for place, choice in enumerate(choices):
        check_text(choice, f"choice {place}")
    return choices


def _parsed(value):
    """Choices or turns as a file may spell them: as they are, or as JSON in a string, which is all that CSV can hold."""
    return parse_json(value, f"the choices or turns are {shown(value)}", "write them as a JSON list") if isinstance(
        value, str) else value
