"""Multiple choice is scored as lm-eval does it: the language model evaluation harness, on the same file of questions."""

import json

import numpy as np
import pytest
import yaml

import distillkit as dk
from distillkit.evaluation.scoring import answered, choice_scores
from distillkit.io.packaged import asset

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed; it is the extra of that name")

TOLERANCE = 1e-4  # of a log-likelihood, in float32; the two differ in padding and in the kernel of attention
QUESTIONS = [  # prompt, choices, answer
    ("Which library draws figures?\nAnswer:", ["matplotlib", "numpy"], 0),
    ("Which library draws figures?\nAnswer:", ["matplotlib", "numpy"], 1),  # so one of the two is right and one is wrong
    ("Return the", ["array", "mean of the values along the given axis", "x"], 1),
    ("What is two and two?\nA. 3\nB. 4\nC. 22\nD. 5\nAnswer:", ["A", "B", "C", "D"], 1),
    ("Compute the singular value decomposition of a matrix. The three factors are returned in the form of",
     ["order", "a tuple of arrays", "float64", "None", "another matrix, whose shape is that of the input", "?"], 4),
    ("Ein Maß für die Größe eines Vektors:\nAntwort:", ["Länge", "die größte naïve Zahl", "Ωμέγα", "café"], 0),
    ("次の単語は", ["配列", "array", "行列の積 🙂"], 1),
    ("The letter is", ["é", "q"], 0),  # two bytes and one: more likely by bytes, less likely by characters
    ("The default is  \n", ["True", "False"], 0),  # spaces at its end belong to the choice
    ("\tName:", [" indented", "two\nlines", "trailing ", "(a, b) -> c"], 3),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The questions as a folder of jsonl."""
    folder = tmp_path_factory.mktemp("questions")
    rows = [{"prompt": prompt, "response": choices[answer], "choices": choices, "answer": answer}
            for prompt, choices, answer in QUESTIONS]
    for split in ("train", "validation", "test"):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    """Log-likelihoods of the choices, the same per character, and the two accuracies."""
    task = dk.load_task(str(folder), max_length=256)
    student = dk.load_student("offline:tiny-opt", task, trainable="full", device="cpu")
    params = student.init(0)
    accuracies = tuple(float(right.mean()) for right in answered(student, params, task, "test"))
    return *choice_scores(student, params, task, "test", range(len(QUESTIONS))), accuracies


def harness(folder, home, delimiter=" ", **model_args):
    """Log-likelihoods of the choices, whether each question is answered rightly by each metric, and the accuracies."""
    from lm_eval.tasks import TaskManager

    metrics = ("acc", "acc_norm", "acc_bytes")
    (home / "questions.yaml").write_text(yaml.safe_dump({
        "task": "questions", "output_type": "multiple_choice", "num_fewshot": 0, "test_split": "test",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "test.jsonl")}, "cache_dir": str(home / "cache")},
        "doc_to_text": "prompt", "doc_to_choice": "choices", "doc_to_target": "answer", "target_delimiter": delimiter,
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics],
    }), encoding="utf-8")
    found = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(asset("tiny-opt")), "dtype": "float32", **model_args}, device="cpu",
        batch_size=4, tasks=["questions"], task_manager=TaskManager(include_path=str(home), include_defaults=False),
        log_samples=True, bootstrap_iters=0, random_seed=None, numpy_random_seed=None, torch_random_seed=None)
    samples = sorted(found["samples"]["questions"], key=lambda sample: sample["doc_id"])
    assert [(s["doc"]["prompt"], s["doc"]["choices"], s["target"]) for s in samples] == QUESTIONS
    scores = [np.array([float(score) for score, _ in sample["filtered_resps"]]) for sample in samples]
    right = {name: [bool(sample[name]) for sample in samples] for name in metrics}
    return scores, right, {name: found["results"]["questions"][f"{name},none"] for name in metrics}


@pytest.fixture(scope="module")
def theirs(folder, tmp_path_factory):
    return harness(folder, tmp_path_factory.mktemp("harness"))


def right(scores, length=lambda choice: 1):
    """Whether the choice with the highest score over its length is the answer, a question at a time."""
    return [np.argmax(found / [length(choice) for choice in choices]) == answer
            for found, (_, choices, answer) in zip(scores, QUESTIONS, strict=True)]


def test_every_choice_has_the_same_log_likelihood(ours, theirs):
    for found, expected, (_, choices, _) in zip(ours[0], theirs[0], QUESTIONS, strict=True):
        assert found.shape == expected.shape == (len(choices),)
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
        assert np.diff(np.sort(found)).min() > 10 * TOLERANCE, "and different choices have different ones"


def test_the_same_choices_are_picked(ours, theirs):
    """lm-eval's acc_norm divides by characters, as choice_scores does; by bytes other choices would be picked."""
    plain, by_length, accuracies = ours
    scores, verdicts, overall = theirs
    for found, mean, expected, (_, choices, _) in zip(plain, by_length, scores, QUESTIONS, strict=True):
        lengths = [len(choice) for choice in choices]
        np.testing.assert_allclose(mean, expected / lengths, rtol=0, atol=TOLERANCE)
        assert np.diff(np.sort(mean)).min() > 10 * TOLERANCE
        assert (np.argmax(found), np.argmax(mean)) == (np.argmax(expected), np.argmax(expected / lengths))
    by_bytes = right(plain, lambda choice: len(choice.encode()))
    assert (right(plain), right(by_length), by_bytes) == tuple(verdicts[name] for name in ("acc", "acc_norm", "acc_bytes"))
    assert accuracies == pytest.approx((overall["acc"], overall["acc_norm"]), abs=1e-12)
    assert min(accuracies) > 0 and max(accuracies) < 1
    assert accuracies[0] != accuracies[1] and verdicts["acc_norm"] != verdicts["acc_bytes"], "the metrics are told apart"


@pytest.mark.parametrize("changed", [{"delimiter": ""}, {"add_bos_token": False}])
def test_another_way_of_joining_would_be_noticed(ours, folder, tmp_path, changed):
    """Without the space in front of a choice, or the beginning of text in front of a prompt, the scores are others."""
    scores, _, _ = harness(folder, tmp_path, **changed)
    for found, other in zip(ours[0], scores, strict=True):
        assert np.abs(found - other).max() > 100 * TOLERANCE
