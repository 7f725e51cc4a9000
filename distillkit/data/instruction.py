"""Instruction tasks: prompts with responses, scored as text or as multiple choice.

A row is a *prompt*, a *response* that is trained on, and for scoring the *choices* that the response is one of: a model
answers with the choice it gives the highest likelihood. As the language model evaluation harness does, a prompt and what
continues it are tokenised together, with a space between, and what follows the prompt's own tokens is the continuation.
A prompt that is too long loses tokens in front, since the question stands at its end. Where two choices read the same,
either is right if one is. Rows without choices are scored by the likelihood of their response.

Rows of other projects are read as prompt and response: prompt with completion; instruction with input or context and
output or response (Alpaca, Dolly); and conversations, the last reply of which is the response (chat `messages`, ShareGPT).

The offline questions, `docstrings_qa`, are made of the first sentences of docstrings (see `corpora.py`), all with four
choices, and so that the choices alone tell nothing:

* **library**: which library is this sentence from? The two kinds of guessing that need no reading are worth no more than
  chance. No library has more than a quarter of the rows (the largest lose the rest), and each is offered as a wrong
  choice three times as often as it is right.
* **function**: which function or class does this sentence describe? All choices are names of one library. Two of the
  wrong ones are close: they hold as many words of the sentence as can be found, and as little else, up to what the right
  one does, and then they share words or the module with it; for two questions in three the second is close to the first
  instead, or the name that is most like the others would be the right one. The third is any name. Where each wrong name
  holds fewer words of the sentence than the right one, the question is left out; so is a sentence that describes
  several names.

A sentence found in two libraries is left out, and one found twice counts once. Both kinds are split by the sentence.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distillkit.data import corpora
from distillkit.data.corpora import Corpus, CorpusError, Split, first_sentence, same_sentence_key
from distillkit.data.labels import whole
from distillkit.data.tables import named, parse_json, shown
from distillkit.data.tasks import CARVED, NO_TARGET, SPLITS, Task, check_text, limited, with_test_split
from distillkit.io.progress import progress
from distillkit.io.seeds import generator

COLUMNS = ("prompt", "response", "choices", "answer", "group")
GROUP = COLUMNS.index("group")
CHUNK = 1000  # rows that are tokenised at once


@dataclass(frozen=True, eq=False)
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

    @property
    def labels(self):
        raise AttributeError("an instruction task has no labels; its rows have response, choices and answer")

    def split(self, name: str):
        """The rows of "train", "validation" or "test"; a `ValueError` for any other name, or where there is no train."""
        rows = super().split(name)
        if rows is None:
            raise CorpusError(f"{self.name} has no {name} split ({self.origin}); add {name}.jsonl to its folder, or train "
                              "on another task and only evaluate on this one")
        return rows

    def rows_by_class(self, split: str) -> list[np.ndarray]:
        """One pool with the indices of all rows of that split, since there are no classes."""
        return [np.arange(len(self.split(split)))]

    def token_ids(self, tokenizer, split: str) -> list[list[int]]:
        """Each prompt of a split in tokens, with the special tokens in front and none behind.

        Cut from the left, special tokens spared, so that it fits into `max_length` with the longest continuation of its
        row. Where the tokenizer has a chat template, the prompt is the user's turn. Kept as long as `tokenizer` is.
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
        """Raise `ValueError` unless each of `rows` (default: all of the split) has choices, which accuracy is told by."""
        bare = self.without_choices(split, rows)
        if len(bare):
            raise ValueError(f"task {self.name!r}, split {split!r} has {len(bare)} rows without choices, such as row {bare[0]} "
                             "(counted from 0), and accuracy can only be told of choices; add them, or call evaluate, which "
                             "then gives the loss of the responses")

    def are_right(self, split: str, rows: Sequence[int] | np.ndarray, picks: Sequence[int] | np.ndarray) -> np.ndarray:
        """Whether each of `picks`, a place among the choices of the row beside it, or -1, is right; bool [n].

        A choice that reads as the right one does is right as well.
        """
        right, columns = [], self.split(split)[[int(row) for row in rows]]
        for pick, prompt, choices, answer in zip(picks, columns["prompt"], columns["choices"], columns["answer"]):
            same = pick >= 0 and choices[pick] == choices[answer]
            right.append(bool(same) or int(pick) in self._also_right.get((prompt, answer), ()))
        return np.array(right, dtype=bool)

    def batch(self, tokenizer, split: str, rows: Sequence[int] | np.ndarray | Tensor) -> dict[str, Tensor]:
        """Rows as `input_ids` [b, l] and `attention_mask` [b, l], the prompts, and `labels` [b, r], the responses.

        All int64; prompts are padded right to the longest, responses with -100.
        """
        rows = [int(row) for row in rows]
        inputs, responses = self._inputs(tokenizer, split, rows), self.response_ids(tokenizer, split)
        labels = [torch.tensor(responses[row]) for row in rows]
        return inputs | {"labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=NO_TARGET)}

    def _tokens(self, tokenizer, split: str) -> tuple[list, list, list]:
        """The prompts, the responses and the choices of all rows in ids."""
        kept = self._token_ids.setdefault(tokenizer, {})
        if split not in kept:
            rows, found = self.split(split), []
            for start in progress(range(0, len(rows), CHUNK), desc=f"tokenising {split}", leave=False):
                found += self._tokenised(tokenizer, split, start, rows[start : start + CHUNK])
            kept[split] = tuple(map(list, zip(*found)))
        return kept[split]

    def _tokenised(self, tokenizer, split: str, start: int, rows: dict[str, list]) -> Iterator[tuple[list, list, list]]:
        """(prompt, response, choices) in ids of each of `rows`, columns of the split from row `start` on."""
        front, space, contexts = _front(tokenizer), " ", rows["prompt"]
        chat = tokenizer.chat_template is not None
        if chat:
            space, contexts = "", [_chat(tokenizer, prompt) for prompt in contexts]
        texts = [list(dict.fromkeys([*choices, response])) for choices, response in zip(rows["choices"], rows["response"])]
        heads = _ids(tokenizer, contexts if chat else [context.rstrip() for context in contexts])
        wholes = iter(_ids(tokenizer, [context + space + text for context, row in zip(contexts, texts) for text in row]))
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        for place, head in enumerate(heads):
            tails = {text: next(wholes)[len(head) :] for text in texts[place]}
            response, choices = tails[rows["response"][place]] + end, [tails[text] for text in rows["choices"][place]]
            own = front if not chat or head[: len(front)] == front else []
            body = head[len(own) :] if chat else head
            room = self.max_length - len(own) - max(map(len, [response, *choices]))
            where = f"{self.name}, split {split}, row {start + place} (counted from 0; {self.origin})"
            if room < 1:
                text = max(tails, key=lambda text: len(tails[text]))
                raise CorpusError(f"{where}: {text[:40]!r} leaves no token of the prompt within max_length="
                                  f"{self.max_length}; use {self.max_length - room + 1} or more, or shorten it")
            if not body or not all(tails.values()):
                text = next((text for text, tail in tails.items() if not tail), rows["prompt"][place])
                raise CorpusError(f"{where}: this tokenizer makes no token of {text[:40]!r}; drop the row or use another "
                                  "tokenizer")
            yield own + body[-room:], response, choices


def _front(tokenizer) -> list[int]:
    """The special tokens that a tokenizer puts before a text."""
    whole_text = tokenizer("a", return_special_tokens_mask=True)
    return whole_text["input_ids"][: whole_text["special_tokens_mask"].index(0)]


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


# --- rows ------------------------------------------------------------------------------------------------------------


def instruction_task(corpus: Corpus, *, max_length: int, limits: Mapping[str, int], seed: int) -> InstructionTask:
    """The task that a corpus of prompts makes; for the arguments see `load.load_task`.

    `limits` take as many rows of every group, as far as they go. Raises `CorpusError` for rows that cannot be used.
    """
    trainless = corpus.layout == "mmlu" and "train" not in corpus.splits
    corpus = with_test_split(corpus, needed=("test",) if trainless else ("train", "test"))
    also_right: dict[tuple[str, int], tuple[int, ...]] = {}
    rows = {name: _checked(corpus, name, also_right) for name in corpus.splits}
    origin = corpus.origin + "; no training split" * trainless
    if "validation" not in rows:
        if trainless or len(rows["train"]) < 2:
            raise CorpusError(f"{corpus.name} has no validation split and none can be made: a tenth of train is taken, and "
                              f"{'there is no train' if trainless else 'train has one row'}; add validation.jsonl")
        rows["train"], rows["validation"] = _carved(rows["train"], seed)
        origin += f"; validation is {CARVED:.0%} of train (seed {seed})"
    rows |= {name: _limited(rows[name], most, name, seed) for name, most in limits.items() if name in rows}
    made: dict[str, Any] = {name: _dataset(rows[name]) if name in rows else None for name in SPLITS}
    content = json.dumps(["instruction", *([name, rows.get(name)] for name in SPLITS)])
    return InstructionTask(corpus.name, "instruction", (), **made, max_length=max_length, origin=origin,
                           fingerprint=hashlib.sha256(content.encode()).hexdigest(), _also_right=also_right)


def _checked(corpus: Corpus, name: str, also_right: dict[tuple[str, int], tuple[int, ...]]) -> list[tuple]:
    """The rows of a split as tuples in the order of `COLUMNS`; raises at the first that cannot be used.

    Adds to `also_right` what the choices of a row do not tell; see `InstructionTask`.
    """
    split, read = corpus.splits[name], ROWS[corpus.layout]
    if not split.texts:
        raise CorpusError(f"{corpus.name}, split {name} has no rows ({split.place})")
    rows = []
    for number, (text, label, *further) in enumerate(zip(split.texts, split.labels, *split.further.values())):
        where = f"{corpus.name}, split {name}, {split.row(number)}"
        try:
            *row, right = read(text, label, **dict(zip(split.further, further)))
        except ValueError as error:
            raise CorpusError(f"{where}: {error}") from None
        if len(right) > 1:
            also_right[row[0], row[COLUMNS.index("answer")]] = right
        rows.append(tuple(row))
    return rows


def _prompt_row(prompt, response, choices=None, answer=None, group=None) -> tuple:
    check_text(prompt, "prompt")
    check_text(response, "response")
    group = _group(group)
    choices = _parsed(choices or [])
    if not choices:
        if answer not in (None, "", -1, "-1"):
            raise ValueError(f"the answer is {shown(answer)}, but there are no choices; add them or leave the answer out")
        return prompt, response, [], -1, group, ()
    choices = _two_or_more(choices)
    number = whole(answer)
    if answer in (None, "") and response in choices:
        number = choices.index(response)
    if number is None or not 0 <= number < len(choices):
        raise ValueError(f"the answer is {shown(answer)}, which is none of the {len(choices)} choices; number them from 0, or "
                         "leave the answer out where the response is a choice")
    if response in choices and response != choices[number]:
        raise ValueError(f"the answer is {number}, the choice {shown(choices[number])}, but the response is the choice "
                         f"{shown(response)}; correct one of them")
    return prompt, response, choices, number, group, ()


def _group(name) -> str:
    """The name of a row's group, a number as it is written, and "" where there is none."""
    if name is None or isinstance(name, str) and not name.strip():
        return ""
    if isinstance(name, list | dict):
        raise ValueError(f"the group is {shown(name)}; write one name")
    check_text(str(name), "group")
    return str(name)


def _arc_row(question, key, choices=None) -> tuple:
    check_text(question, "question")
    choices = _parsed(choices)
    if not isinstance(choices, dict) or not {"text", "label"} <= choices.keys():
        raise ValueError(f"the choices are {shown(choices)}; give a text and a label list")
    texts, keys = _two_or_more(choices["text"]), choices["label"]
    if not isinstance(keys, list) or len(keys) != len(texts) or len({*map(str, keys)}) < len(keys):
        raise ValueError(f"the labels of the choices are {shown(keys)}; give a different one for each of {len(texts)} choices")
    if key not in keys:
        raise ValueError(f"the answer key is {shown(key)}, which is none of the choices {named(map(str, keys))}; correct it")
    answer = keys.index(key)
    return f"Question: {question}\nAnswer:", texts[answer], texts, answer, "", ()


def _mmlu_row(question, answer, choices=None, subject=None) -> tuple:
    check_text(question, "question")
    choices = _two_or_more(choices)
    letters, number = string.ascii_uppercase[: len(choices)], whole(answer)
    if number is None or not 0 <= number < len(choices):
        raise ValueError(f"the answer is {shown(answer)}, which is none of the {len(choices)} choices; number them from 0")
    lines = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices))
    right = tuple(place for place, choice in enumerate(choices) if choice == choices[number])
    return f"{question.strip()}\n{lines}\nAnswer:", letters[number], list(letters), number, _group(subject), right


def _instruction_row(instruction, response, input=None, context=None, system=None, category=None, history=None) -> tuple:
    """An instruction as the prompt, what a system is told above it, and below it what it is about."""
    check_text(instruction, "instruction")
    if not _is_blank(history):
        raise ValueError(f"the history is {shown(history)}; write the conversation as a list of messages")
    if not _is_blank(input) and not _is_blank(context):
        raise ValueError(f"there are an input and a context, {shown(input)} and {shown(context)}; leave one of them empty")
    about = context if _is_blank(input) else input
    return _prompt_row(_paragraphs(system, instruction, about), response, group=category)


def _is_blank(value) -> bool:
    return value is None or value == [] or isinstance(value, str) and value.strip() in ("", "[]")


def _paragraphs(*parts) -> str:
    """Those of `parts` that are not blank, with an empty line between."""
    parts = [part for part in parts if not _is_blank(part)]
    for part in parts:
        check_text(part, "input or the context")
    return "\n\n".join(parts)


ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "chatgpt": "assistant", "model": "assistant"}


def _chat_row(turns, _same_turns, system=None) -> tuple:
    """The last reply of a conversation as the response, and what was said before it as the prompt: the plain text where
    that is one turn (behind a system's), else each turn behind the name of who speaks."""
    turns = _parsed(turns, "turns")
    if isinstance(turns, dict) and all(isinstance(values, list) for values in turns.values()):
        turns = [dict(zip(turns, values)) for values in zip(*turns.values())]  # as the hub stores lists of objects
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"the conversation is {shown(turns)}; give a list of turns with role and content, or from and value")
    spoken = [_turn(turn, place) for place, turn in enumerate(turns)]
    roles = [role for role, _ in spoken]
    if roles[-1] != "assistant" or "user" not in roles[:-1]:
        raise ValueError(f"the roles of the conversation are {named(roles)}; it must end with a reply of the assistant to a "
                         "user, so drop the row or its last turns")
    *asked, (_, response) = spoken
    alone = sum(role != "system" for role, _ in asked) == 1
    said = [text if alone or role == "system" else f"{role.title()}: {text}" for role, text in asked]
    return _prompt_row(_paragraphs(system, *said), response)


def _turn(turn, place: int) -> tuple[str, str]:
    role, text = (turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))) if isinstance(turn, dict) else (
        None, None)
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise ValueError(f"turn {place} (counted from 0) of the conversation is {shown(turn)}; give it a role of "
                         f"{', '.join(ROLES)} and a text")
    check_text(text, f"text of turn {place} (counted from 0)")
    return ROLES[role.lower()], text


# How a row asks and answers, by the layout of its corpus -> its prompt, response, choices, answer, group, and the places of
# all right choices where their texts do not tell. Raises ValueError for a row that cannot be used.
ROWS = {"prompts": _prompt_row, "arc": _arc_row, "mmlu": _mmlu_row, "instruction": _instruction_row, "chat": _chat_row}


def _two_or_more(choices) -> list:
    choices = _parsed(choices)
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError(f"the choices are {shown(choices)}; give a list of two or more")
    for place, choice in enumerate(choices):
        check_text(choice, f"choice {place}")
    return choices


def _parsed(value, role: str = "choices"):
    """Choices or turns as a file may spell them: as they are, or as JSON in a string, which is all that CSV can hold."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value, "")
    except CorpusError:
        raise ValueError(f"the {role} are {shown(value)}; write them as a JSON list") from None


def _carved(rows: list[tuple], seed: int) -> tuple[list, list]:
    """Train without, and validation with, a tenth of the rows: every tenth of those of a group, in random order."""
    order = torch.randperm(len(rows), generator=generator("instruction-carve", seed)).tolist()
    taken = {*sorted(order, key=lambda row: rows[row][GROUP])[:: round(1 / CARVED)]}
    return [row for place, row in enumerate(rows) if place not in taken], [rows[place] for place in sorted(taken)]


def _limited(rows: list[tuple], limit: int, split: str, seed: int) -> list[tuple]:
    groups = {group: number for number, group in enumerate(dict.fromkeys(row[GROUP] for row in rows))}
    return limited((rows, [groups[row[GROUP]] for row in rows]), limit, len(groups), split, seed)[0]


def _dataset(rows: list[tuple]):
    import datasets

    text = datasets.Value("string")
    types = (text, text, datasets.List(text), datasets.Value("int64"), text)
    return datasets.Dataset.from_dict(dict(zip(COLUMNS, map(list, zip(*rows)))),
                                      features=datasets.Features(dict(zip(COLUMNS, types))))


# --- questions about docstrings --------------------------------------------------------------------------------------

ASKED = {"library": "Which library is this sentence from?",
         "function": "Which function or class does this sentence describe?"}
BUILDER = 2  # raise whenever the same sources would give other questions
CHOICES = 4
SHARE = 4  # how many words of a sentence are worth as much as a name that holds nothing else


def docstrings_qa(source: str = "docstrings_qa") -> Corpus:
    """The offline questions, from the cache or built; "docstrings_qa:library" and ":function" are of one kind only."""
    found, made_of = corpora.built("docstrings_qa", build_docstrings_qa, [corpora.BUILDER, BUILDER])
    kinds = {source.partition(":")[2]} - {""} or {*ASKED}
    splits = {}
    for name, columns in found.items():
        chosen = [row for row, kind in enumerate(columns["group"]) if kind in kinds]
        kept = {column: [values[row] for row in chosen] for column, values in columns.items()}
        splits[name] = Split(kept.pop("prompt"), kept.pop("response"), f"the docstring questions, split {name}", kept)
    return Corpus(source, None, splits, f"questions about the docstrings of installed libraries: {made_of}", "prompts")


def held_out() -> frozenset[str]:
    """The `same_sentence_key`s of what pre-training must leave out: the sentences that `docstrings_qa` judges models on.

    That is its test split, and its validation split too, or settings would be chosen on questions whose answer was read.
    """
    splits = docstrings_qa().splits
    return frozenset(same_sentence_key(text.split("\n")[1]) for name in ("validation", "test") for text in splits[name].texts)


def build_docstrings_qa() -> dict:
    """{split: {column: [...]}}, the same for the same installed versions; 80 / 10 / 10 by sentence in hash order."""
    found = _summaries()
    rows = [*_library_questions(found)]
    for library in progress(found, desc="writing questions", leave=False):
        rows += _function_questions(found[library])
    rows.sort(key=lambda row: _digest(row["group"] + row["key"]))
    # Not by the plain digest: which rows of a large library are kept depends on that, and must not decide the split.
    keys = sorted({row["key"] for row in rows}, key=lambda key: _digest("split" + key))
    bounds = (0, len(keys) * 8 // 10, len(keys) * 9 // 10, len(keys))
    splits = {}
    for name, first, last in zip(SPLITS, bounds, bounds[1:]):
        chosen = {*keys[first:last]}
        splits[name] = {column: [row[column] for row in rows if row["key"] in chosen] for column in COLUMNS}
    return splits


def _summaries() -> dict[str, dict[str, tuple[str, set[str]]]]:
    """library -> key -> (sentence, the dotted paths it describes), without the keys that two libraries have."""
    found = {}
    with corpora.collector_paused():
        for library in progress(corpora.LIBRARIES, desc="reading docstrings", leave=False):
            found[library] = {}
            for path, docstring in corpora.documented(library).items():
                if "." in path and (sentence := first_sentence(docstring)):
                    key = same_sentence_key(sentence)
                    other, paths = found[library].get(key, (sentence, set()))
                    found[library][key] = min(sentence, other), paths | {path}
    owners = Counter(key for summaries in found.values() for key in summaries)
    return {library: {key: summary for key, summary in summaries.items() if owners[key] == 1}
            for library, summaries in found.items()}


def _library_questions(found: dict) -> Iterator[dict]:
    sizes = [len(summaries) for summaries in found.values()]
    most = next(cap for cap in range(max(sizes), 0, -1) if CHOICES * cap <= sum(min(size, cap) for size in sizes))
    rows = [(key, library) for library in found for key in sorted(found[library], key=_digest)[:most]]
    right, wrong = Counter(library for _, library in rows), Counter()
    for key, library in sorted(rows, key=lambda row: _digest(row[0])):
        others = sorted(right.keys() - {library}, key=lambda other: (wrong[other] / right[other], _digest(key + other)))
        wrong.update(others[: CHOICES - 1])
        yield _question("library", key, found[library][key][0], [library, *others[: CHOICES - 1]])


def _function_questions(summaries: dict) -> Iterator[dict]:
    names = _Names(path for _, paths in summaries.values() for path in paths)
    for key, (sentence, paths) in summaries.items():
        described = {path.rpartition(".")[2] for path in paths}
        if len(described) == 1 and (choices := names.choices(sentence, *described)):
            yield _question("function", key, sentence, choices)


class _Names:
    """The names of one library. A name's features are its words, their beginnings, and its module."""

    def __init__(self, paths) -> None:
        homes = {}
        for path in sorted(paths):
            home, _, name = path.rpartition(".")
            homes.setdefault(name, home)
        self.names = list(homes)
        self.spelled = np.array([name.replace("_", "").lower() for name in self.names])
        self.features = [_words(name) | {home} for name, home in homes.items()]
        self.size = np.array([len(features) for features in self.features])
        having = defaultdict(list)
        for place, features in enumerate(self.features):
            for feature in features:
                having[feature].append(place)
        self.having = {feature: np.array(places) for feature, places in having.items()}

    def choices(self, sentence: str, name: str) -> list[str] | None:
        """`name` and three wrong ones by the rule in the module's docstring; None where there are none that are fair."""
        draw, right = generator("docstrings-qa", sentence), self.names.index(name)
        found = self.shared(_words(sentence))
        worth = found + SHARE * found / self.size
        ties = 1e-3 * torch.rand(len(worth), generator=draw).numpy()
        worth = np.minimum(worth, worth[right]) + ties
        chosen = [right]
        for pivot in (0, int(torch.rand((), generator=draw) > 1 / 3)):
            chosen.append(self.closest(chosen[pivot], worth, chosen))
        others = np.flatnonzero(self.unlike(chosen))
        if not len(others) or found[right] > found[chosen[1:]].max():
            return None
        chosen.append(others[torch.randint(len(others), (), generator=draw)])
        return [self.names[place] for place in chosen]

    def closest(self, pivot: int, worth: np.ndarray, chosen: list[int]) -> int:
        both = self.shared(self.features[pivot])
        return int(np.where(self.unlike(chosen), worth + both / (self.size + self.size[pivot] - both), -1).argmax())

    def shared(self, features: frozenset[str]) -> np.ndarray:
        """For each name, how many of `features` it has."""
        counts = np.zeros(len(self.names))
        for feature in features & self.having.keys():
            counts[self.having[feature]] += 1
        return counts

    def unlike(self, chosen: list[int]) -> np.ndarray:
        """For each name, whether it differs from those chosen by more than case and underscores."""
        return np.all([self.spelled != self.spelled[place] for place in chosen], axis=0)


def _question(kind: str, key: str, sentence: str, choices: list[str]) -> dict:
    """A row; `choices` come with the right one first and are shuffled."""
    order = torch.randperm(CHOICES, generator=generator("docstrings-qa-order", kind, key)).tolist()
    return {"key": key, "prompt": f"{ASKED[kind]}\n{sentence}\nAnswer:", "response": choices[0],
            "choices": [choices[place] for place in order], "answer": order.index(0), "group": kind}


def _words(text: str) -> frozenset[str]:
    """The words of a sentence, or of a name in snake or camel case, and the first four letters of each."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", text) if len(word) > 1]
    return frozenset([*words, *(word[:4] for word in words)])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
