"""The sizes of a notebook: which column is chosen, and what a reduced run cuts."""

import pytest

import distillkit as dk

CPU = {"student": "offline:minilm", "corpus_limit": None, "outer_steps": 1, "lr": 0.1, "seeds": (0, 1, 2)}
GPU = {"student": "bert-base-uncased", "corpus_limit": 5000, "outer_steps": 1000, "lr": 0.2, "seeds": (0, 1, 2)}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv("DISTILLKIT_SCALE", raising=False)
    monkeypatch.delenv("DISTILLKIT_REDUCED", raising=False)


def sizes(cfg):
    return {name: getattr(cfg, name) for name in CPU}


@pytest.mark.parametrize(("variable", "name", "column"), [("", "cpu", CPU), ("cpu", "cpu", CPU), ("gpu", "gpu", GPU)])
def test_the_variable_chooses_a_column(monkeypatch, variable, name, column):
    monkeypatch.setenv("DISTILLKIT_SCALE", variable)
    cfg = dk.scale(CPU, GPU)
    assert (cfg.scale, cfg.reduced, sizes(cfg)) == (name, False, column)


@pytest.mark.parametrize(("name", "expected"), [
    ("cpu", {"student": "offline:minilm", "corpus_limit": 96, "outer_steps": 1, "lr": 0.1, "seeds": (0, 1)}),
    ("gpu", {"student": "bert-base-uncased", "corpus_limit": 96, "outer_steps": 2, "lr": 0.2, "seeds": (0, 1)}),
])
def test_a_reduced_run_cuts_budgets_and_nothing_else(monkeypatch, name, expected):
    monkeypatch.setenv("DISTILLKIT_SCALE", name)
    monkeypatch.setenv("DISTILLKIT_REDUCED", "1")
    cfg = dk.scale(CPU, GPU)
    assert cfg.reduced and sizes(cfg) == expected
    assert CPU["seeds"] == (0, 1, 2), "the dictionary of the notebook is left alone"


def test_claims_are_asserted_unless_reduced(monkeypatch):
    cfg = dk.scale(CPU, GPU)
    cfg.claim(True, "two is more than one")
    with pytest.raises(AssertionError, match="learned beats random .*cpu"):
        cfg.claim(False, "learned beats random")
    monkeypatch.setenv("DISTILLKIT_REDUCED", "1")
    dk.scale(CPU, GPU).claim(False, "learned beats random")


@pytest.mark.parametrize(("variable", "value"), [("DISTILLKIT_SCALE", "tpu"), ("DISTILLKIT_REDUCED", "yes")])
def test_an_unknown_value_of_a_variable_is_named(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"{variable} .*'{value}'"):
        dk.scale(CPU, GPU)
