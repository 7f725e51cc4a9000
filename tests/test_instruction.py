"""Instruction tasks: prompts and continuations are tokenised as they are scored, and the offline questions are fair."""

import copy
import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

import distillkit as dk
from distillkit.data import instruction
from distillkit.data.corpus import SPLITS, CorpusError
from distillkit.data.instruction import InstructionTask
from distillkit.data.load import load_task
from distillkit.data.tasks import Task
from distillkit.io.seeds import generator

WARM = {"prompt": "It was warm and fresh.\nAnswer:", "response": "tender", "choices": ["dull", "tender", "a stale day"],
        "answer": 1, "group": "mood"}
PLAIN = {"prompt": "Name a river", "response": "the coast"}


def rows_of(count, prefix="row", **changed):
    return [WARM | {"prompt": f"{prefix} {number} was fresh.\nAnswer:"} | changed for number in range(count)]


@pytest.fixture
def write(tmp_path):
    """Writes splits as jsonl and returns their folder."""

    def write(name="mine", **splits):
        (tmp_path / name).mkdir(exist_ok=True)
        for split, rows in splits.items():
            (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    return write


@pytest.fixture
def mood(write):
    """Loads a task of the given rows, the same in all splits."""
    return lambda *rows, **settings: load_task(write(train=rows, validation=rows, test=rows), **settings)


@pytest.fixture(scope="session")
def tokenizers(standin_home):
    """Two of the stand-in hub: byte-level BPE, `<s> ... </s>`, and word pieces, `[CLS] ... [SEP]`, without end of text."""
    from transformers import AutoTokenizer

    import standin_hub

    with standin_hub.patched(standin_home):
        return {name: AutoTokenizer.from_pretrained(name) for name in ("facebook/opt-1.3b", "bert-base-uncased")}


@pytest.fixture(scope="session")
def opt(tokenizers):
    return tokenizers["facebook/opt-1.3b"]


# --- what a task is --------------------------------------------------------------------------------------------------


def test_a_task_by_contract(write):
    folder = write(train=rows_of(5), validation=[WARM, PLAIN], test=rows_of(3, "test"))
    task = load_task(folder, max_length=32)
    assert isinstance(task, InstructionTask) and isinstance(task, Task) and dk.InstructionTask is InstructionTask
    assert (task.name, task.kind, task.classes, task.max_length) == ("mine", "instruction", (), 32)
    assert [len(task.split(name)) for name in SPLITS] == [5, 2, 3] and str(folder) not in task.origin
    assert task.validation.column_names == ["prompt", "response", "choices", "answer", "group"]
    assert task.validation[0] == WARM and task.validation[1] == PLAIN | {"choices": [], "answer": -1, "group": ""}
    with pytest.raises(ValueError, match="no split 'dev'"):
        task.split("dev")
    assert load_task(folder, max_length=9, seed=4).fingerprint == task.fingerprint
    write(test=rows_of(3, "other"))
    assert load_task(folder).fingerprint != task.fingerprint


def test_the_rows_are_one_pool(write):
    task = load_task(write(train=rows_of(7), test=rows_of(2)))
    (pool,) = task.rows_by_class("test")
    assert pool.tolist() == [0, 1]
    once, more = (task.balanced_rows("train", size, generator("test")) for size in (6, 14))
    assert len(task.train) == 6 and sorted(once.tolist()) == [*range(6)]
    assert sorted(Counter(more.tolist()).values()) == [2, 2, 2, 2, 3, 3]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_other_formats_give_the_same_rows(write, suffix):
    import pandas

    rows = [WARM, PLAIN | {"choices": [], "answer": -1, "group": ""}]
    folder = write("other")
    table = pandas.DataFrame(rows)
    for split in ("train", "validation", "test"):
        if suffix == "csv":
            table.assign(choices=table["choices"].map(json.dumps)).to_csv(folder / f"{split}.csv", index=False)
        else:
            table.to_parquet(folder / f"{split}.parquet")
    assert load_task(folder).fingerprint == load_task(write(train=rows, validation=rows, test=rows)).fingerprint


def test_validation_is_a_tenth_of_every_group(write):
    rows = rows_of(40, group="a") + rows_of(20, "other", group="b")
    task = load_task(write(train=rows, test=rows_of(2, "test")))
    assert Counter(task.validation["group"]) == {"a": 4, "b": 2} and "validation is 10% of train (seed 0)" in task.origin
    prompts = task.train["prompt"][:] + task.validation["prompt"][:]
    assert sorted(prompts) == sorted(row["prompt"] for row in rows)
    assert task.fingerprint != load_task(write(train=rows), seed=1).fingerprint
    with pytest.raises(CorpusError, match="small has no validation split .* train has one row"):
        load_task(write("small", train=rows[:1], test=rows[:1]))


def test_limit_takes_as_many_of_every_group(write):
    rows = rows_of(40, group="a") + rows_of(20, "other", group="b") + rows_of(3, "few", group="c")
    folder = write(train=rows, validation=rows, test=rows)
    assert Counter(load_task(folder, limit=13).train["group"]) == {"a": 5, "b": 5, "c": 3}
    assert len(load_task(folder, limit=2).train) == 2
    assert load_task(folder, limit=100).fingerprint == load_task(folder).fingerprint
    assert load_task(folder, limit=13).fingerprint != load_task(folder, limit=13, seed=1).fingerprint


# --- tokens ----------------------------------------------------------------------------------------------------------


def test_prompt_and_continuation_are_tokenised_together(mood, opt):
    task = mood(WARM, PLAIN)
    front = [opt.bos_token_id]
    for row, texts in enumerate(([*WARM["choices"], WARM["response"]], [PLAIN["response"]])):
        (prompt,) = (task.token_ids(opt, "test")[row],)
        found = [*task.choice_ids(opt, "test", row), task.response_ids(opt, "test")[row][:-1]]
        assert prompt == front + opt(task.test[row]["prompt"], add_special_tokens=False)["input_ids"]
        assert [opt.decode(ids) for ids in found] == [" " + text for text in texts]
        for text, ids in zip(texts, found):
            assert prompt + ids + [opt.eos_token_id] == opt(f"{task.test[row]['prompt']} {text}")["input_ids"]
        assert task.response_ids(opt, "test")[row][-1] == opt.eos_token_id
    assert task.choice_ids(opt, "test", 1) == []
    assert task.token_ids(opt, "test") is task.token_ids(opt, "test")


def test_a_space_at_the_end_of_the_prompt_belongs_to_the_continuation(mood, opt):
    task = mood(PLAIN | {"prompt": "Name a river: \n"})
    (prompt,), (response,) = task.token_ids(opt, "test"), task.response_ids(opt, "test")
    assert opt.decode(prompt[1:]) == "Name a river:" and opt.decode(response[:-1]) == " \n the coast"


def test_a_tokenizer_without_end_of_text(mood, tokenizers):
    bert = tokenizers["bert-base-uncased"]
    task = mood(PLAIN)
    (prompt,), (response,) = task.token_ids(bert, "test"), task.response_ids(bert, "test")
    assert prompt + response + [bert.sep_token_id] == bert("Name a river the coast")["input_ids"]


def test_a_long_prompt_is_cut_from_its_left(mood, opt):
    long = WARM | {"prompt": "so dull " * 40 + WARM["prompt"]}
    whole = mood(long, max_length=400)
    (full,), longest = whole.token_ids(opt, "test"), max(
        len(ids) for ids in [*whole.choice_ids(opt, "test", 0), *whole.response_ids(opt, "test")])
    cut = mood(long, max_length=longest + 9)
    (kept,) = cut.token_ids(opt, "test")
    assert kept == full[:1] + full[-8:] and cut.response_ids(opt, "test") == whole.response_ids(opt, "test")
    assert mood(long, max_length=longest + 2).token_ids(opt, "test") == [[full[0], full[-1]]]
    with pytest.raises(CorpusError, match=rf"mine, split test, row 0 .*a local folder named mine.* leaves no "
                       rf"token of the prompt within max_length={longest + 1}; use {longest + 2} or more"):
        mood(long, max_length=longest + 1).token_ids(opt, "test")


def test_the_end_of_text_counts_for_the_response(mood, opt):
    task = mood(PLAIN, max_length=64)
    ((*_, last),), (response,) = task.token_ids(opt, "test"), task.response_ids(opt, "test")
    assert mood(PLAIN, max_length=len(response) + 2).token_ids(opt, "test") == [[opt.bos_token_id, last]]
    with pytest.raises(CorpusError, match="leaves no token of the prompt"):
        mood(PLAIN, max_length=len(response) + 1).token_ids(opt, "test")


def test_a_chat_template_frames_the_prompt(mood, opt):
    chat = copy.deepcopy(opt)
    chat.chat_template = ("{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
                          "{% if add_generation_prompt %}<assistant>\n{% endif %}")
    task = mood(WARM)
    (prompt,), (response,) = task.token_ids(chat, "test"), task.response_ids(chat, "test")
    assert chat.decode(prompt) == f"<s><user>{WARM['prompt']}\n<assistant>\n"
    assert chat.decode(response) == "tender</s>" and chat.decode(task.choice_ids(chat, "test", 0)[2]) == "a stale day"
    short = mood(WARM, max_length=12).token_ids(chat, "test")[0]
    assert short[0] == chat.bos_token_id and short[1:] == prompt[-len(short) + 1 :], "the beginning of text is spared"


def test_rows_are_tokenised_in_parts(mood, opt, monkeypatch):
    rows = [WARM | {"prompt": f"day {number}"} for number in range(4)] + [PLAIN]
    whole, parts = mood(*rows), mood(*rows)
    whole.token_ids(opt, "test")
    monkeypatch.setattr(instruction, "CHUNK", 2)
    for name in ("token_ids", "response_ids"):
        assert getattr(parts, name)(opt, "test") == getattr(whole, name)(opt, "test")
    assert [parts.choice_ids(opt, "test", row) for row in range(5)] == [whole.choice_ids(opt, "test", row)
                                                                         for row in range(5)]
    with pytest.raises(CorpusError, match="row 3 "):
        mood(*rows[:3], rows[3] | {"response": "dull " * 99}).token_ids(opt, "test")


def test_batch_pads_prompts_and_responses(mood, opt):
    task = mood(WARM, PLAIN)
    batch = task.batch(opt, "test", torch.tensor([1, 0]))
    prompts, responses = task.token_ids(opt, "test"), task.response_ids(opt, "test")
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(
        ["input_ids", "attention_mask", "labels"], torch.int64)
    assert batch["input_ids"].shape == (2, max(map(len, prompts))) and batch["labels"].shape == (2, max(map(len, responses)))
    for row, ids, mask, labels in zip((1, 0), batch["input_ids"], batch["attention_mask"], batch["labels"]):
        assert mask.tolist() == [1] * len(prompts[row]) + [0] * (len(mask) - len(prompts[row]))
        assert ids[mask.bool()].tolist() == prompts[row] and {*ids[~mask.bool()].tolist()} <= {opt.pad_token_id}
        assert labels.tolist() == responses[row] + [-100] * (len(labels) - len(responses[row]))
    with pytest.raises(ValueError, match="at least one row"):
        task.batch(opt, "test", [])


# --- bad rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed, message", [
    ({"prompt": " "}, "the prompt is ' '; it must be"),
    ({"response": None}, "the response is None; it must be"),
    ({"response": ["tender"]}, r"the response is \['tender'\]; it must be"),
    ({"response": "half \ud83d"}, "the response is .*surrogate"),
    ({"group": ["mood"]}, r"the group is \['mood'\]; it must be"),
    ({"group": "half \ud83d"}, "the group is .*surrogate"),
    ({"choices": ["tender"]}, r"the choices are \['tender'\]; give a list of two or more"),
    ({"choices": "dull, tender"}, "the choices or turns are 'dull, tender': not JSON .*; write them as a JSON list"),
    ({"choices": ["", "tender"]}, "the choice 0 is ''; it must be"),
    ({"choices": []}, r"the choices are \[\]; give a list of two or more"),
    ({"answer": 3}, "the answer is 3, which is none of the 3 choices; number them from 0"),
    ({"answer": "B"}, "the answer is 'B', which is none of the 3 choices"),
    ({"answer": None, "response": "neither"}, "the answer is None, which is none of the 3 choices"),
    ({"answer": 0}, "the answer is 0, the choice 'dull', but the response is the choice 'tender'; correct one"),
])
def test_bad_rows_are_named_by_place(write, changed, message):
    rows = rows_of(4)
    rows[2] |= changed
    with pytest.raises(CorpusError, match=rf"mine, split test, row 2 \(counted from 0; .*test.jsonl, line \d\): {message}"):
        load_task(write(train=rows_of(4), test=rows))


@pytest.mark.parametrize("choices", ["[" * 100_000, "[" * 900 + "]" * 900, [["a"], "b"], [None, "a"], [" ", "a"], [1, "a"]])
def test_choices_that_are_none(write, choices):
    rows = rows_of(4)
    rows[2] |= {"choices": choices}
    with pytest.raises(CorpusError, match=r"mine, split test, row 2 \(counted from 0; .*test.jsonl, line 3\): the choice"):
        load_task(write(train=rows_of(4), test=rows))


def test_the_answer_may_be_left_to_the_response(mood):
    assert mood({name: WARM[name] for name in ("prompt", "response", "choices")}).test["answer"][:] == [1]
    assert mood(WARM | {"answer": "2", "response": "the third of them"}).test["answer"][:] == [2]


def test_columns_and_splits_that_are_missing(write):
    with pytest.raises(CorpusError, match="test.jsonl has no column 'response', which its layout needs: it has prompt"):
        load_task(write(train=rows_of(2), test=[{"prompt": "a"}]))
    with pytest.raises(CorpusError, match="no column 'label'.*prompts with their responses go into columns named prompt and"):
        load_task(write("other", train=[{"text": "a"}]))
    with pytest.raises(CorpusError, match="third has no train split"):
        load_task(write("third", test=rows_of(2)))


def test_a_near_miss_is_pointed_out():
    for source, meant in (("docstring_qa", "docstrings_qa"), ("docstrings_qa:libary", "docstrings_qa:library"),
                          ("arc-easy", "arc_easy"), ("mmul", "mmlu")):
        with pytest.raises(CorpusError, match=f"unknown task '{source}' .did you mean '{meant}'"):
            load_task(source)


# --- rows as other projects write them -------------------------------------------------------------------------------

QUESTION, TEXT, REPLY = "Name a river.", "It flows to the coast.", "The tender one."
SAY = [("system", "Be warm."), ("user", QUESTION), ("assistant", "No."), ("user", "Do!"), ("assistant", REPLY)]


def turns(said, role="role", content="content", names=None):
    return [{role: (names or {}).get(who, who), content: text} for who, text in said]


SHARED_NAMES = {"user": "human", "assistant": "gpt"}


@pytest.mark.parametrize("row, prompt, group", [
    ({"prompt": QUESTION, "completion": REPLY}, QUESTION, ""),
    ({"instruction": QUESTION, "input": TEXT, "output": REPLY}, f"{QUESTION}\n\n{TEXT}", ""),
    ({"instruction": QUESTION, "input": "", "output": REPLY, "text": "all of it"}, QUESTION, ""),
    ({"instruction": QUESTION, "input": None, "output": REPLY}, QUESTION, ""),
    ({"instruction": QUESTION, "output": REPLY}, QUESTION, ""),
    ({"instruction": QUESTION, "context": TEXT, "response": REPLY, "category": "open_qa"}, f"{QUESTION}\n\n{TEXT}", "open_qa"),
    ({"instruction": QUESTION, "context": " ", "response": REPLY}, QUESTION, ""),
    ({"instruction": QUESTION, "input": TEXT, "response": REPLY}, f"{QUESTION}\n\n{TEXT}", ""),
    ({"instruction": QUESTION, "input": "", "context": TEXT, "output": REPLY, "history": []}, f"{QUESTION}\n\n{TEXT}", ""),
    ({"system": "Be warm.", "instruction": QUESTION, "output": REPLY}, f"Be warm.\n\n{QUESTION}", ""),
    ({"system": "Be warm.", "messages": turns(SAY[1:2] + SAY[-1:])}, f"Be warm.\n\n{QUESTION}", ""),
    ({"messages": turns(SAY[1:2] + SAY[-1:])}, QUESTION, ""),
    ({"messages": turns(SAY[:2] + SAY[-1:]), "id": 3}, f"Be warm.\n\n{QUESTION}", ""),
    ({"messages": turns(SAY)}, f"Be warm.\n\nUser: {QUESTION}\n\nAssistant: No.\n\nUser: Do!", ""),
    ({"conversations": turns(SAY[1:2] + SAY[-1:], "from", "value", SHARED_NAMES), "id": "x"}, QUESTION, ""),
    ({"conversations": turns(SAY[1:], "from", "value", SHARED_NAMES)},
     f"User: {QUESTION}\n\nAssistant: No.\n\nUser: Do!", ""),
])
@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_instruction_formats_are_read_as_prompt_and_response(write, ending, row, prompt, group):
    import pandas

    folder = write()
    for split in SPLITS:
        table = pandas.DataFrame([row] * 2)
        if ending == "jsonl":
            table.to_json(folder / f"{split}.jsonl", orient="records", lines=True)
        elif ending == "csv":
            spelled = table.map(lambda value: json.dumps(value) if isinstance(value, list) else value)
            spelled.to_csv(folder / f"{split}.csv", index=False)
        else:
            table.to_parquet(folder / f"{split}.parquet")
    expected = {"prompt": prompt, "response": REPLY, "choices": [], "answer": -1, "group": group}
    task = load_task(folder)
    assert task.kind == "instruction" and [task.split(split)[1] for split in SPLITS] == [expected] * 3


@pytest.mark.parametrize("row, message", [
    ({"instruction": "", "input": TEXT, "output": REPLY}, "the instruction is ''"),
    ({"instruction": QUESTION, "input": ["a"], "output": REPLY}, r"the input or the context is \['a'\]"),
    ({"instruction": QUESTION, "input": TEXT, "context": TEXT, "output": REPLY}, "there are an input and a context"),
    ({"instruction": QUESTION, "history": [["a", "b"]], "output": REPLY}, "the history is "),
    ({"instruction": QUESTION, "input": TEXT, "output": None}, "the response is None"),
    ({"messages": []}, r"the conversation is \[\]"),
    ({"messages": "hello"}, "the choices or turns are 'hello'"),
    ({"messages": turns(SAY[:2])}, "the conversation has the roles system, user; it must end with a reply"),
    ({"messages": turns(SAY[-1:])}, "the conversation has the roles assistant"),
    ({"messages": turns(SAY[1:3], names={"assistant": "tool"})}, "turn 1 .*'tool'"),
    ({"messages": [{"role": "user"}, *turns(SAY[-1:])]}, "the text of turn 0 .* is None"),
    ({"messages": ["hello", *turns(SAY[-1:])]}, "turn 0 .* is 'hello'"),
    ({"conversations": turns([("user", QUESTION), ("gpt", " ")], "from", "value")}, "the text of turn 1 .* is ' '"),
])
def test_bad_rows_of_other_projects_are_named_by_place(write, row, message):
    good = {name: turns(SAY) if name in ("messages", "conversations") else QUESTION for name in row if name != "history"}
    good |= {"context": ""} if "context" in row else {}
    with pytest.raises(CorpusError, match=rf"split test, row 2 \(counted from 0; .*test.jsonl, line 3\): .*{message}"):
        load_task(write(train=[good], validation=[good], test=[good, good, row]))


ODD = [None, "", " ", 0, -1, 1.5, True, [], ["a"], ["a", "a"], {}, {"text": ["a", "b"], "label": ["A", "B"]}, [[1]],
       '["a", "b"]', "half \ud83d", float("nan"), 10**400, [{"role": "user", "content": "a"}], {"role": [1], "content": [2]},
       [None], "\x1b[31m"]
FULL_ROWS = [
    WARM, WARM | {"completion": "tender"}, {"messages": turns(SAY), "system": "a"}, {"conversations": turns(SAY)},
    dict.fromkeys(("instruction", "input", "output", "system", "category"), QUESTION) | {"history": []},
    {"instruction": QUESTION, "context": TEXT, "response": REPLY, "category": "open_qa"},
]


def test_whatever_stands_in_a_row_it_is_read_or_refused(write):
    outcomes, draw = Counter(), random.Random(0)
    for good, column in [(row, column) for row in FULL_ROWS for column in row]:
        for value in draw.sample(ODD, 6):
            folder = write(**dict.fromkeys(SPLITS, [good, good | {column: value}, good]))
            try:
                outcomes[load_task(folder).kind] += 1
            except CorpusError as error:
                outcomes[str(error).isprintable() and "row 1 " in str(error)] += 1
    assert outcomes.keys() == {"instruction", True}


def test_choices_beside_a_completion(mood):
    row = {"prompt": WARM["prompt"], "completion": WARM["response"], "choices": WARM["choices"]}
    assert mood(row).test[0] == WARM | {"group": ""}


def test_columns_that_can_be_read_in_two_ways(write):
    row = {"instruction": QUESTION, "response": REPLY, "category": "open_qa", "text": "all of it"}
    folder = write(train=[row, row | {"category": "other"}], validation=[row], test=[row])
    with pytest.raises(CorpusError, match="category, instruction, response, text can be read as labelled text and as instr"):
        load_task(folder)
    assert load_task(folder, text_column="text", label_column="category").classes == ("open_qa", "other")


# --- ARC and MMLU ----------------------------------------------------------------------------------------------------

ARC = {"id": "1", "question": "What is warm?", "choices": {"text": ["ice", "the sun", "rain"], "label": ["1", "2", "3"]},
       "answerKey": "2"}
MMLU = {"question": " What is two and two? ", "subject": "sums", "choices": ["3", "4", "22", "5"], "answer": 1}


@pytest.fixture
def data(write, monkeypatch, tmp_path):
    """Writes splits of a known name where it is looked for first."""
    monkeypatch.setenv("DISTILLKIT_DATA", str(tmp_path))
    return write


def test_arc_is_asked_as_the_evaluation_harness_does(data):
    data("arc_easy", train=[ARC] * 10, test=[ARC])
    task = load_task("arc_easy")
    assert task.test[0] == {"prompt": "Question: What is warm?\nAnswer:", "response": "the sun",
                            "choices": ["ice", "the sun", "rain"], "answer": 1, "group": ""}
    assert [len(task.split(name)) for name in SPLITS] == [9, 1, 1]


def test_mmlu_is_asked_as_the_evaluation_harness_does(data):
    data("mmlu", auxiliary_train=[MMLU | {"subject": ""}] * 3, dev=[MMLU | {"answer": 3}], test=[MMLU])
    task = load_task("mmlu")
    assert task.test[0] == {"prompt": "What is two and two?\nA. 3\nB. 4\nC. 22\nD. 5\nAnswer:", "response": "B",
                            "choices": ["A", "B", "C", "D"], "answer": 1, "group": "sums"}
    assert len(task.train) == 3 and task.train["group"][0] == "" and task.validation["response"][:] == ["D"]


def test_mmlu_without_training_rows(data, opt):
    data("mmlu", dev=[MMLU] * 2, validation=[MMLU] * 3, test=[MMLU])
    task = load_task("mmlu", limit=2)
    assert task.train is None and [len(task.split(name)) for name in ("validation", "test")] == [2, 1]
    asked = [lambda: task.split("train"), lambda: task.rows_by_class("train"), lambda: task.batch(opt, "train", [0]),
             lambda: task.balanced_rows("train", 1, generator("test"))]
    for ask in asked:
        with pytest.raises(CorpusError, match=r"mmlu has no train split \(the folder mmlu .*add train.jsonl to its folder"):
            ask()
    assert opt.decode(task.batch(opt, "test", [0])["labels"][0]) == " B</s>"


def test_choices_that_read_the_same_are_all_right(data, mood):
    """Where choices are letters, it is the texts behind them that count."""
    data("mmlu", dev=[MMLU], validation=[MMLU], test=[MMLU, MMLU | {"choices": ["4", "4", "22", "4"]},
                                                      MMLU | {"choices": ["3", "3", "4", "5"], "answer": 2},
                                                      MMLU | {"choices": ["3", "3", "4", "5"], "answer": 0}])
    lettered, named = load_task("mmlu"), mood(WARM, WARM | {"choices": ["tender", "dull", "tender"], "answer": 2},
                                              WARM | {"choices": ["dull", "dull", "tender"], "answer": 2})
    expected = {lettered: ["0100", "1101", "0010", "1100"], named: ["010", "101", "001"]}
    for task, rows in expected.items():
        for row, right in enumerate(rows):
            picks = range(len(right))
            assert task.are_right("test", [row] * len(right), picks).tolist() == [mark == "1" for mark in right]
        assert task.are_right("test", [0, 1, 2], [-1, -1, -1]).tolist() == [False] * 3
    only = load_task("mmlu", limit={"test": 2})
    assert {only.test["prompt"][row]: only.are_right("test", [row], [3]).tolist() for row in range(2)} == {
        prompt: [prompt == lettered.test["prompt"][1]] for prompt in only.test["prompt"]}


@pytest.mark.parametrize("name, row, message", [
    ("arc_easy", ARC | {"answerKey": "B"}, "the answer key is 'B', which is none of the choices 1, 2, 3"),
    ("arc_easy", ARC | {"choices": None}, "the choices are None; give a text and a label list"),
    ("arc_easy", ARC | {"choices": {"text": ["a"], "label": ["2"]}}, r"the choices are \['a'\]; give a list of two"),
    ("arc_easy", ARC | {"question": ""}, "the question is ''"),
    ("mmlu", MMLU | {"answer": 4}, "the answer is 4, which is none of the 4 choices"),
    ("mmlu", MMLU | {"answer": None}, "the answer is None"),
    ("mmlu", MMLU | {"choices": []}, r"the choices are \[\]; give a list of two or more"),
    ("mmlu", MMLU | {"choices": ["3", None, "4", "5"]}, "the choice 1 is None; it must be"),
    ("mmlu", MMLU | {"choices": ["3", "4", " ", "5"]}, "the choice 2 is ' '; it must be"),
    ("arc_easy", ARC | {"choices": {"text": ["a", None, "c"], "label": ["1", "2", "3"]}}, "the choice 1 is None"),
    ("arc_easy", ARC | {"choices": {"text": ["a", "b", "c"], "label": ["1", "2"]}}, "the labels of the choices are"),
    ("arc_easy", ARC | {"choices": {"text": ["a", "b", "c"], "label": ["1", "2", "2"]}}, "the labels of the choices are"),
])
def test_bad_questions_are_named_by_place(data, name, row, message):
    good = ARC if name == "arc_easy" else MMLU
    data(name, train=[good] * 2, validation=[good], test=[good, row])
    with pytest.raises(CorpusError, match=rf"{name}, split test, row 1 \(counted from 0; .*test.jsonl, line \d\): {message}"):
        load_task(name)


def test_known_names_are_read_from_the_hub(standin_hub, opt):
    arc, mmlu = load_task("arc_easy"), load_task("mmlu")
    for task in (arc, mmlu):
        assert [len(task.split(name)) for name in SPLITS] == [60, 20, 20] and task.origin.startswith("Hugging Face hub, ")
        assert all(row["choices"][row["answer"]] == row["response"] for row in task.train)
        assert len(task.batch(opt, "train", range(8))["labels"]) == 8
    assert {*mmlu.test["group"]} == {"poetry", "trade"} and {*mmlu.test["response"]} == {*"ABCD"}


@pytest.mark.parametrize("name, sizes", [("arc_easy", [2025, 226, 2376]), ("mmlu", [None, 285, 2595])])
def test_real_questions(name, sizes):
    root = os.environ.get("DISTILLKIT_DATA")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"$DISTILLKIT_DATA/{name} is not on this machine")
    task = load_task(name)
    assert [getattr(task, split) and len(getattr(task, split)) for split in SPLITS] == sizes


