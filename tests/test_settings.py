"""Values of settings: what fits an annotation, what is converted, and errors that name setting, value and demand."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import pytest

from distillkit.cli.work import Work
from distillkit.experiments.building import unroll_of
from distillkit.experiments.classification import ClassificationJob
from distillkit.experiments.kinds import KINDS
from distillkit.experiments.results import take_up
from distillkit.experiments.runner import CONFIGS
from distillkit.experiments.settings import Grid, Number, Seeds, Whole, kind_of
from distillkit.experiments.values import Misfit, fitted

LIMIT = Whole | dict[Literal["train", "test"], Whole] | None


@pytest.mark.parametrize("kind, value, expected", [
    (int, 2, 2), (float, 2, 2.0), (float, 0.5, 0.5), (str, "a", "a"), (bool, True, True), (int | None, None, None),
    (Number, 2, 2), (Number, 2.0, 2.0), (tuple, [1, "a"], (1, "a")), (tuple[str, ...], ["a"], ("a",)),
    (tuple[float, float], [1, 2], (1.0, 2.0)), (tuple[str, ...], [], ()), (Seeds, [0, 3], (0, 3)),
    (Mapping, {"a": 1}, {"a": 1}), (Literal["a", "b"] | None, "b", "b"), (LIMIT, 3, 3), (LIMIT, {"test": 3}, {"test": 3}),
    (dict[str, tuple[int | float, ...]], {"a": [1, 0.5]}, {"a": (1, 0.5)})])
def test_what_fits_is_taken_and_only_lists_and_whole_numbers_are_converted(kind, value, expected):
    result = fitted(value, kind)
    assert result == expected and type(result) is type(expected)
    if isinstance(expected, tuple):
        assert [*map(type, result)] == [*map(type, expected)]


@pytest.mark.parametrize("kind, value", [
    (int, True), (int, 2.0), (int, "2"), (float, "2"), (float, True), (float, None), (str, 2), (str, None), (bool, 1),
    (tuple, "ab"), (tuple[str, ...], "ab"), (tuple[str, ...], [1]), (tuple[float, float], [1]), (Seeds, []), (Seeds, [0, 0]),
    (Seeds, [True]), (Seeds, 0), (Mapping, [1]), (Literal["a"], "b"), (Literal["a"], ["a"]), (Whole, 0), (LIMIT, 0),
    (LIMIT, {"tset": 3}), (LIMIT, {"test": 0}), (dict[str, int], {1: 1})])
def test_what_does_not_fit_is_refused(kind, value):
    with pytest.raises(Misfit):
        fitted(value, kind)


@pytest.mark.parametrize("changes, said", [
    ({"per_class": 0}, ["per_class", "1", "not 0"]), ({"per_class": None}, ["per_class", "not None"]),
    ({"lr": 0}, ["lr", "not 0"]), ({"lr": math.nan}, ["lr", "not nan"]),
    ({"limit": {"test": 0}}, ["limit", "1", "not 0"]), ({"metagrad": "magic"}, ["metagrad", "replay", "not 'magic'"]),
    ({"eval_seeds": [1, 1]}, ["eval_seeds", "once", "not (1, 1)"]), ({"name": "a b"}, ["name", "pattern", "not 'a b'"]),
    ({"name": "a" * 201}, ["name", "200"]), ({"tuned_grid": {"steps": [1]}}, ["tuned_grid", "2"]),
    ({"outer_stepps": 3}, ["outer_stepps", "no such setting"]), ({"per_class": 0, "lr": 0}, ["per_class", "lr"])])
def test_an_error_names_the_setting_the_value_and_the_demand(changes, said):
    with pytest.raises(ValueError) as refused:
        ClassificationJob(**{"name": "a", "corpus": "docstrings", "student": "offline:minilm", **changes})
    assert all(part in str(refused.value) for part in said), str(refused.value)


def test_a_missing_setting_is_named_and_a_job_cannot_be_changed():
    with pytest.raises(ValueError, match="'corpus' is missing.*'student' is missing"):
        ClassificationJob(name="a")
    grid = {"step_size": [1], "steps": [2]}
    job = ClassificationJob(name="a", corpus="docstrings", student="offline:minilm", lr=1, tuned_grid=grid)
    assert type(job.lr) is float and job.tuned_grid == {"step_size": (1,), "steps": (2,)} and Work().seeds == (0, 1, 2)
    with pytest.raises(AttributeError):
        job.lr = 2.0


@pytest.mark.parametrize("steps, size, expected", [
    (3, None, 0.2), (6, None, 0.2), (10, None, 0.12), (60, None, 0.02), (60, 0.2, 0.2), (3, 0.05, 0.05)])
def test_the_first_step_size_falls_with_the_number_of_steps_unless_it_is_set(steps, size, expected):
    work = Work(unroll_steps=steps, step_size=size)
    assert unroll_of(work).optimizer.step_size == pytest.approx(expected) and unroll_of(work).steps == steps
    assert unroll_of(Work(step_size=size), steps=steps).optimizer.step_size == pytest.approx(expected)


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_file_of_settings_still_describes_its_committed_result(config):
    """A default that changes changes no experiment silently: its file names the value that it was run with."""
    job = KINDS[kind_of(config)][0].from_yaml(config)
    path = Path(__file__).parents[1] / "figures" / "results" / f"{job.name}.json"
    assert take_up(path, job, job.cells() if isinstance(job, Grid) else {job.name: job})["config"]["name"] == job.name
