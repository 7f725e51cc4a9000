"""Demonstrations in a context: read once or with every question, as tokens or as embeddings, the scores are the same."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

import distillkit as dk
from distillkit.applications import prompting
from distillkit.applications.merging import renamed, with_classes
from distillkit.applications.prompting import CONTENT_FREE, few_shot, questions
from distillkit.cli.main import main
from distillkit.evaluation.scoring import answered, choice_scores, log_likelihoods
from distillkit.experiments import prompting as prompting_jobs
from distillkit.experiments import results
from distillkit.experiments.kinds import table_of
from distillkit.experiments.prompting import PromptingCell, PromptingJob, order_deviation, prompting_table
from distillkit.experiments.results import by_set, frame
from distillkit.experiments.runner import Run
from distillkit.io.seeds import derive_seed

NAMES = ["facebook/opt-1.3b", "meta-llama/Llama-3.2-1B", "gpt2", "google/gemma-3-270m"]
PAIRS = [("a dull and tired story", "bad"), ("it was warm , almost tender", "brilliant fun"),
         ("what a stale flat day", "bad"), ("so clever that nobody missed the rest", "brilliant fun")]
WORDS = {"neg": "bad", "pos": "brilliant fun"}
ROWS = list(range(12))


@pytest.fixture(scope="module")
def asked(task):
    return questions(with_classes(task, WORDS), template="{text}\nIt was")


@pytest.fixture(scope="module")
def readers(asked, standin_home):
    import standin_hub

    with standin_hub.patched(standin_home):
        return {name: dk.load_student(name, asked, trainable="full") for name in NAMES}


def test_classes_become_words_to_choose_from(task, asked):
    row, old = asked.test[3], task.test[3]
    assert row["prompt"] == f"{old['text']}\nIt was" and row["choices"] == ["bad", "brilliant fun"]
    assert row["response"] == row["choices"][old["label"]] and row["group"] == row["response"]
    assert asked.kind == "instruction" and asked.max_length > task.max_length and asked.fingerprint != task.fingerprint


@pytest.mark.parametrize("name", NAMES)
def test_without_demonstrations_it_is_multiple_choice(readers, asked, name):
    student = readers[name]
    found = few_shot(asked, student)
    plain, by_length = answered(student, student.init(0), asked, "test")
    assert (found.mean, found.normalized[0]) == pytest.approx((plain.mean(), by_length.mean()))
    assert found.k == 0 and found.dropped == (0,) and len(found.scores) == 1 and np.isnan(found.std)
    likelihoods, _ = choice_scores(student, student.init(0), asked, "test", range(len(asked.test)))
    right = [-torch.tensor(scores).log_softmax(0)[row["answer"]]
             for scores, row in zip(likelihoods, asked.test, strict=True)]
    assert found.losses == pytest.approx((float(sum(right)) / len(right),), abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_context_read_once_scores_as_one_read_with_every_question(readers, asked, name):
    student, tokenizer = readers[name], readers[name].tokenizer
    opening = tokenizer("a")["input_ids"][: len(prompting.special_frame(tokenizer)[0])]
    shown = prompting._demonstrations(asked, student, PAIRS, None, "\n\n")
    context = torch.cat([prompting._embedded(student, opening), *(parts for _, parts in shown)])
    heads = [asked.token_ids(tokenizer, "test")[row][len(opening) :] for row in ROWS]
    tails = [asked.choice_ids(tokenizer, "test", row) for row in ROWS]
    once = log_likelihoods(student, heads, tails, memory=prompting.remember(student, context), batch_size=5)
    for head, of, scores in zip(heads, tails, once, strict=True):
        for choice, score in zip(of, scores, strict=True):
            embeds = torch.cat([context, prompting._embedded(student, head)])[None]
            batch = {"inputs_embeds": embeds, "attention_mask": torch.ones(embeds.shape[:2], dtype=torch.long)}
            with torch.no_grad():
                plain = student.log_likelihood({}, batch, torch.tensor([choice])).sum()
            assert score == pytest.approx(float(plain), abs=1e-4)
    # Without a context the scores are those of multiple choice.
    alone = log_likelihoods(student, heads, tails, memory=prompting.remember(student, context[: len(opening)]), batch_size=5)
    theirs, _ = choice_scores(student, student.init(0), asked, "test", ROWS)
    assert np.allclose(np.stack(alone), np.stack(theirs), atol=1e-4)


def test_scores_by_hand(readers, asked):
    student = readers["gpt2"]
    found = few_shot(asked, student, PAIRS, k=4, orders=2, seed=3, rows=ROWS, separator="\n")
    answers = np.array(asked.test["answer"])[ROWS]

    def by_hand(context, prompts):
        scores = np.empty((len(prompts), 2))
        for (row, prompt), (column, word) in ((r, c) for r in enumerate(prompts) for c in enumerate(asked.names)):
            head, whole = (student.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, f"{prompt} {word}"))
            read = student.tokenizer(context, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([special + read + whole])
            with torch.no_grad():
                said = student.module(input_ids=ids).logits[0].log_softmax(-1)
            at = len(special) + len(read) + len(head) - 1
            scores[row, column] = sum(float(said[at + j, token]) for j, token in enumerate(whole[len(head) :]))
        return scores

    special = prompting.special_frame(student.tokenizer)[0]
    for order in range(2):
        chosen = prompting._order(["bad", "brilliant fun"] * 2, 4, prompting.generator("few-shot-order", 3, order))
        context = "".join(f"{PAIRS[i][0]}\nIt was {PAIRS[i][1]}\n" for i in chosen)
        plain = by_hand(context, [asked.test[row]["prompt"] for row in ROWS])
        empty = by_hand(context, [f"{nothing}\nIt was" for nothing in CONTENT_FREE])
        prior = np.log((np.exp(empty) / np.exp(empty).sum(1, keepdims=True)).mean(0))
        for scores, told in ((plain, found.scores), (plain / [3, 13], found.normalized), (plain - prior, found.calibrated)):
            assert told[order] == pytest.approx(float((scores.argmax(1) == answers).mean()))
    assert found.mean == pytest.approx(np.mean(found.scores)) and found.std == pytest.approx(np.std(found.scores, ddof=1))
    assert "4 shots, 2 orders" in str(found) and f" ± {found.std:.3f}" in str(found)
    assert "±" not in str(few_shot(asked, student, rows=ROWS)), "one order has no spread"


def test_embeddings_are_read_as_the_tokens_they_are(readers, task, asked, standin_hub):
    name = "facebook/opt-1.3b"
    shots = renamed(dk.select(task, dk.load_student(name, task), "random", per_class=2, length=8), WORDS)
    student, free = readers[name], dataclasses.replace(shots, tokens=None)
    for (_, read), row, kept, label in zip(prompting._demonstrations(asked, student, free, 5, "\n"), shots.tokens, shots.free,
                                           shots.meta["labels"], strict=True):
        behind = student.tokenizer(f"\nIt was {asked.names[label]}\n", add_special_tokens=False)["input_ids"]
        assert torch.equal(read, prompting._embedded(student, row[kept][:5].tolist() + behind))
    text, embeddings = (few_shot(asked, student, s, k=2, rows=ROWS) for s in (shots, free))
    assert embeddings.rows == text.rows == 12 and len(embeddings.scores) == 4
    with pytest.raises(ValueError, match="table of 'facebook/opt-1.3b'.* 'gpt2' has another.*only text moves"):
        few_shot(asked, readers["gpt2"], free, rows=ROWS)
    assert few_shot(asked, readers["gpt2"], shots, rows=ROWS).k == 4, "text can be read by any model"


def test_orders_are_seeded_and_balanced():
    answers = ["a"] * 5 + ["b"] * 2 + ["c"]
    orders = [prompting._order(answers, 3, prompting.generator("few-shot-order", 0, order)) for order in range(20)]
    assert all(sorted(answers[i] for i in order) == ["a", "b", "c"] for order in orders)
    assert len({tuple(order) for order in orders}) > 5
    assert len({order[0] for order in orders}) > 2, "not always the same class in front"
    again = prompting._order(answers, 3, prompting.generator("few-shot-order", 0, 7))
    assert again == orders[7]
    everything = prompting._order(answers, 8, prompting.generator("few-shot-order", 0, 0))
    assert sorted(everything) == list(range(8))


def test_what_outgrows_the_positions_is_left_out_and_counted(readers, asked):
    student = readers["gpt2"]
    small = dataclasses.replace(student, max_positions=70)
    found = few_shot(asked, small, PAIRS * 5, rows=ROWS, orders=2)
    assert min(found.dropped) > 0 and max(found.context) < 70
    assert few_shot(asked, student, PAIRS, rows=ROWS, orders=2).dropped == (0, 0)
    longer, cut = (few_shot(asked, student, PAIRS, rows=ROWS, orders=1, length=n).context[0] for n in (None, 2))
    assert cut < longer
    with pytest.raises(ValueError, match="not one demonstration has room beside a question of .* 20 positions of 'gpt2'"):
        few_shot(asked, dataclasses.replace(student, max_positions=20), PAIRS, rows=ROWS)


def test_an_instruction_task_shows_prompts_with_responses(standin_hub):
    task = dk.load_task("arc_easy", max_length=48)
    student = dk.load_student("gpt2", task, trainable="full")
    shots = dk.DistilledSet.from_real(task, student, fraction=0.1)
    found = few_shot(task, student, shots, k=2, orders=2)
    assert found.calibrated is None and found.rows == len(task.test)
    (answer, read), *_ = prompting._demonstrations(task, student, shots, None, "\n\n")
    whole = f"{shots.meta['text'][0]} {shots.meta['responses'][0]}\n\n"
    assert answer == shots.meta["responses"][0] and len(read) == len(prompting._ids(student.tokenizer, whole))
    with pytest.raises(ValueError, match="made for another kind of task"):
        few_shot(questions(dk.load_task("rotten_tomatoes", max_length=12)), student, shots)


def test_what_cannot_be(readers, asked, world):
    task, classifier = world
    student = readers["gpt2"]
    with pytest.raises(ValueError, match="a template holds {text} once, not 'x'"):
        questions(task, template="x")
    with pytest.raises(ValueError, match="asks questions already"):
        questions(asked)
    for this, reader in ((task, student), (asked, classifier)):
        with pytest.raises(ValueError, match=r"make asked = questions\(task\)"):
            few_shot(this, reader)
    with pytest.raises(ValueError, match="k must be a whole number from 0 to 4 .*, not 5"):
        few_shot(asked, student, PAIRS, k=5)
    with pytest.raises(ValueError, match="class 'good', which is none of bad, brilliant fun"):
        few_shot(asked, student, [("x", "good")])
    with pytest.raises(ValueError, match="there must be questions to answer"):
        few_shot(asked, student, rows=[])
    with pytest.raises(ValueError, match="no split 'exam'"):
        few_shot(asked, student, split="exam")
    chat = dataclasses.replace(student, tokenizer=SimpleNamespace(chat_template="{{ messages }}"))
    with pytest.raises(ValueError, match="is a chat model"):
        few_shot(asked, chat)


# The experiment


SMALL = {
    "name": "small", "corpus": "rotten_tomatoes", "student": "facebook/opt-1.3b", "max_length": 12, "length": 8,
    "seeds": [0, 1], "orders": 2, "test_rows": 10, "validation_rows": 6, "judged_shots": 2, "templates": ["{text}\nIt was",
    "{text} :"], "outer_steps": 2, "outer_batch": 4, "judge_steps": 5, "swap_steps": 2, "candidates": 4, "least": 1,
    "sentence_steps": 2, "sentences": 20, "draws": 3, "draw_rows": 6,
    "rows": ["zero-shot/0", "random/2", "k_center/2", "herding/2", "keywords/2", "sentences/2", "likeliest/2", "embeddings/2",
             "projection/2", "nearest sentences/2", "swaps/2", "wrong labels/2"],
}


@pytest.fixture(scope="module")
def finished(standin_home, tmp_path_factory):
    """One complete run from a file of settings."""
    import standin_hub

    folder = tmp_path_factory.mktemp("finished")
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL | {"kind": "prompting"}))
    with standin_hub.patched(standin_home):
        assert main(["run", str(folder / "small.yaml"), "--results", str(folder), "--work", str(folder / "work")]) == 0
    return folder, results.read(folder / "small.json")


def job(**changes):
    return PromptingJob(**{k: tuple(v) if isinstance(v, list) else v for k, v in (SMALL | changes).items()})


def test_every_score_is_made(finished):
    _, result = finished
    orders = {"zero-shot/0": (0,)}
    assert [(score["row"], score["set_seed"], score["order"]) for score in result["scores"]] == [
        (row, seed, order) for row in sorted(SMALL["rows"]) for seed in (0, 1) for order in orders.get(row, (0, 1))]
    for score in result["scores"]:
        assert score["questions"] == 10 and score["shots"] == int(score["row"][-1])
        assert all(0 <= score[measure] <= 1 for measure in ("accuracy", "normalized", "calibrated"))
    notes = result["cells"]["small"]["notes"]
    template = notes["template"]
    assert template["validation"].keys() == {*SMALL["templates"]}
    assert template["chosen"] == max(SMALL["templates"], key=lambda t: np.mean(template["validation"][t]))
    assert notes["embeddings 1"].keys() >= {"losses", "trained on the start", "trained on the set"}


def test_an_interrupted_run_goes_on(finished, standin_hub, monkeypatch):
    folder, result = finished
    monkeypatch.setattr(prompting_jobs, "few_shot", lambda *a, **kw: pytest.fail("scored again"))
    run = Run(PromptingCell, job(), folder, folder / "work")
    assert run() == result
    monkeypatch.setattr(PromptingCell, "create", lambda *a: pytest.fail("made again"))
    cell = run.cell
    assert cell.set_of("swaps", 1).tokens is not None
    assert cell.template() == result["cells"]["small"]["notes"]["template"]["chosen"]
    wrong, right = cell.shots("wrong labels", 0), cell.set_of("random", 0)
    assert [text for text, _ in wrong] == right.meta["text"]
    assert all(name != cell.task.classes[label] for (_, name), label in zip(wrong, right.meta["labels"], strict=True))


def test_the_likeliest_draw_is_the_one_the_reader_says(finished, standin_hub):
    folder, result = finished
    cell = Run(PromptingCell, job(), folder, folder / "work").cell
    losses = result["cells"]["small"]["notes"]["likeliest 1"]["losses"]
    draws = [dk.select(cell.task, cell.student, "random", **job().size(derive_seed("prompting-draw", 1, n))) for n in range(3)]
    assert len(losses) == 3 and cell.set_of("likeliest", 1).meta["rows"] == draws[int(np.argmin(losses))].meta["rows"]


def test_another_model_may_read(standin_hub, tmp_path):
    cell = Run(PromptingCell, job(reader="gpt2", rows=["random/2"]), tmp_path, tmp_path / "work").cell
    assert cell.reader.name == "gpt2" != cell.student.name
    columns = cell.columns("random", "2")
    assert (columns["source"], columns["target"]) == (cell.student.name, "gpt2")


def test_the_table(finished):
    _, result = finished
    lines, scores = prompting_table(result).splitlines(), frame(result)
    assert table_of(result).splitlines() == lines and len(lines) == 2 + len(SMALL["rows"]) + 2
    for name in ("random/2", "swaps/2"):
        (line,) = (line for line in lines if line.startswith(f"| {name[:-2]} | 2 |"))
        by_order = scores[scores["row"] == name].pivot(index="set_seed", columns="order", values="accuracy").to_numpy()
        deviation = np.sqrt(np.mean(np.var(by_order, axis=1, ddof=1)))
        assert order_deviation(scores[scores["row"] == name]) == pytest.approx(deviation)
        assert f"| {by_set(result).loc[name].mean():.3f} ({deviation:.3f}) |" in line
        assert "±" not in line and ("two sets" in line) == (name == "swaps/2")
    partial = result | {"scores": [score for score in result["scores"] if score["row"] != "random/2"]}
    assert "| random | 2 | not run |" in prompting_table(partial)


@pytest.mark.parametrize(("changes", "message"), [
    ({"reader": "gpt2"}, "cannot read embeddings of"),
    ({"rows": ["poetry/2"]}, "the source of row 'poetry/2' must be one of zero-shot"),
    ({"rows": ["random/0"]}, "a row is a source and its demonstrations"),
    ({"rows": ["zero-shot/3"]}, "a row is a source and its demonstrations"),
    ({"orders": 0}, "orders must be"),
    ({"lr": 0}, "lr must be"),
    ({"seeds": []}, "seeds must name at least one seed"),
    ({"templates": []}, "templates must have at least 1 item"),
])
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        job(**changes)
