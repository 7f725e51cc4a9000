"""The one switch between a laptop and a workstation."""

import dataclasses

import pytest

from distillkit.view import scale


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv("DISTILLKIT_SCALE", raising=False)
    monkeypatch.delenv("DISTILLKIT_REDUCED", raising=False)


def test_cpu_is_the_default_and_needs_no_hub():
    for notebook in scale.TABLE:
        cfg = scale.settings(notebook)
        assert (cfg.scale, cfg.notebook, cfg.reduced) == ("cpu", notebook, False)
        assert cfg.corpus.startswith("docstrings")
        assert cfg.student.startswith("offline:")


def test_gpu_takes_hub_names(monkeypatch):
    monkeypatch.setenv("DISTILLKIT_SCALE", "gpu")
    for notebook in scale.TABLE:
        cfg = scale.settings(notebook)
        assert cfg.scale == "gpu"
        assert not cfg.corpus.startswith("docstrings")
        assert not cfg.student.startswith("offline:")


@pytest.mark.parametrize("notebook", scale.TABLE)
@pytest.mark.parametrize("name", scale.SCALES)
def test_reduced_budgets_are_small_whatever_is_overridden(monkeypatch, notebook, name):
    monkeypatch.setenv("DISTILLKIT_SCALE", name)
    monkeypatch.setenv("DISTILLKIT_REDUCED", "1")
    cfg = scale.settings(notebook, outer_steps=10_000, corpus_limit=10_000)
    assert cfg.reduced
    assert cfg.outer_steps <= 2 and cfg.unroll_steps <= 2 and cfg.corpus_limit <= 96 and len(cfg.seeds) == 2


def test_overrides_change_a_copy():
    plain, cfg = scale.settings("00_quickstart"), scale.settings("00_quickstart", outer_steps=3)
    assert cfg.outer_steps == 3
    assert dataclasses.replace(cfg, outer_steps=plain.outer_steps) == plain
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.outer_steps = 4


def test_claims_are_asserted_unless_reduced(monkeypatch):
    cfg = scale.settings("00_quickstart")
    cfg.claim(True, "two is more than one")
    with pytest.raises(AssertionError, match=r"learned beats random .*00_quickstart, scale cpu"):
        cfg.claim(False, "learned beats random")
    monkeypatch.setenv("DISTILLKIT_REDUCED", "1")
    scale.settings("00_quickstart").claim(False, "learned beats random")


def test_the_summary_names_what_a_reader_wants_to_know():
    text = str(scale.settings("00_quickstart"))
    assert "cpu scale" in text and "offline:minilm" in text and "docstrings" in text and "\n" not in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"outer_step": 3}, r"no field outer_step; the fields are .*outer_steps"),
        ({"scale": "gpu"}, r"no field scale"),
        ({"outer_steps": 0}, r"outer_steps must be an integer of at least 1, got 0"),
        ({"per_class": 1.0}, r"per_class must be an integer of at least 1, got 1\.0"),
        ({"corpus_limit": -1}, r"corpus_limit .*got -1"),
        ({"length": 4096}, r"length must be at most max_length \(\d+\), got 4096"),
        ({"seeds": (1,)}, r"seeds must be two or more different integers, got \(1,\)"),
        ({"seeds": (1, 1)}, r"seeds must be two or more different integers"),
    ],
)
def test_bad_overrides_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        scale.settings("00_quickstart", **overrides)


def test_unknown_notebooks_and_scales_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"'99_nothing'.*00_quickstart"):
        scale.settings("99_nothing")
    monkeypatch.setenv("DISTILLKIT_SCALE", "tpu")
    with pytest.raises(ValueError, match=r"DISTILLKIT_SCALE must be cpu or gpu, got 'tpu'"):
        scale.settings("00_quickstart")
    monkeypatch.setenv("DISTILLKIT_SCALE", "cpu")
    monkeypatch.setenv("DISTILLKIT_REDUCED", "yes")
    with pytest.raises(ValueError, match=r"DISTILLKIT_REDUCED must be 0 or 1, got 'yes'"):
        scale.settings("00_quickstart")
