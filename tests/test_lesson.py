"""The sizes of a lesson: which column is chosen, what a reduced run caps, and when claims are checked."""

import pytest

import distillkit as dk

SIZES = {"student": ("offline:minilm", "bert-base-uncased"), "corpus_limit": (None, 5000), "outer_steps": (1, 1000),
         "lr": (0.1, 0.2), "seeds": ((0, 1, 2), (0, 1, 2))}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for variable in ("SCALE", "REDUCED", "CLAIMS"):
        monkeypatch.delenv(f"DISTILLKIT_{variable}", raising=False)


def chosen(cfg):
    return {name: getattr(cfg, name) for name in SIZES}


@pytest.mark.parametrize(("variable", "name", "column"), [("", "cpu", 0), ("cpu", "cpu", 0), ("gpu", "gpu", 1)])
def test_the_variable_chooses_a_column(monkeypatch, variable, name, column):
    monkeypatch.setenv("DISTILLKIT_SCALE", variable)
    cfg = dk.sizes(**SIZES)
    assert (cfg.scale, cfg.reduced, chosen(cfg)) == (name, False, {size: pair[column] for size, pair in SIZES.items()})


@pytest.mark.parametrize(("name", "expected"), [
    ("cpu", {"student": "offline:minilm", "corpus_limit": 96, "outer_steps": 1, "lr": 0.1, "seeds": (0, 1)}),
    ("gpu", {"student": "bert-base-uncased", "corpus_limit": 96, "outer_steps": 2, "lr": 0.2, "seeds": (0, 1)}),
])
def test_a_reduced_run_caps_budgets_and_nothing_else(monkeypatch, name, expected):
    monkeypatch.setenv("DISTILLKIT_SCALE", name)
    monkeypatch.setenv("DISTILLKIT_REDUCED", "1")
    cfg = dk.sizes(**SIZES)
    assert cfg.reduced and chosen(cfg) == expected


def test_claims_are_checked_where_outputs_are_made_and_not_where_a_reader_plays(monkeypatch):
    cfg = dk.sizes(**SIZES)
    cfg.claim(False, "learned beats random")
    monkeypatch.setenv("DISTILLKIT_CLAIMS", "1")
    cfg.claim(True, "two is more than one")
    with pytest.raises(AssertionError, match="learned beats random .*cpu"):
        cfg.claim(False, "learned beats random")
    monkeypatch.setenv("DISTILLKIT_REDUCED", "1")
    dk.sizes(**SIZES).claim(False, "learned beats random")


@pytest.mark.parametrize(("variable", "value"), [("DISTILLKIT_SCALE", "tpu"), ("DISTILLKIT_REDUCED", "yes")])
def test_an_unknown_value_of_a_variable_is_named(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"{variable} .*'{value}'"):
        dk.sizes(**SIZES)


def test_a_size_without_its_second_column_is_named():
    with pytest.raises(ValueError, match="outer_steps is 20"):
        dk.sizes(outer_steps=20)
