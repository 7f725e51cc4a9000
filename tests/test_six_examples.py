"""The cards of a learned set say what its vectors are, and the figure of the evidence shows the committed scores."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

import distillkit as dk
from distillkit.experiments.results import read
from distillkit.text.projection import allowed_tokens
from distillkit.view import figures as plots
from pictures import six_examples as six

RESULTS = Path(__file__).resolve().parent.parent / "figures" / "results"


@pytest.fixture
def snapshots(world):
    """A set as it starts, and with one position of its first example moved onto the vector of another word."""
    task, student = world
    start = dk.DistilledSet.from_real(task, student, per_class=1, length=10)
    embeds = start.embeds.clone()
    position = int(start.free[0].nonzero()[0])
    words = allowed_tokens(student.tokenizer, len(student.embedding)).nonzero().flatten().tolist()
    other = next(i for i in words if i != int(start.tokens[0, position]))
    embeds[0, position] = student.embedding[other]
    return start, dataclasses.replace(start, embeds=embeds, tokens=None), other


def test_cards_name_the_words_that_changed_and_how_far_they_are(snapshots, world):
    start, moved, other = snapshots
    data = six.read_cards([start, moved], world[1])
    assert data.classes == list(start.meta["classes"]) and data.own == start.meta["labels"]
    assert [sum(map(sum, step)) for step in data.changed] == [0, 1]
    assert data.words[1][0][0] == world[1].tokenizer.convert_ids_to_tokens(other)
    assert max(max(map(max, step)) for step in data.distances) < 1e-5
    assert data.yardstick > 0 and np.allclose(data.labels.sum(-1), 1)


def test_a_sheet_of_cards_is_titled_and_a_strip_names_its_steps(snapshots, world):
    data = six.read_cards(snapshots[:2], world[1])
    strip = six.cards(data, [0, 1], title="Two moments")
    assert "Two moments" in plots.describe(strip) and "outer step" in plots.describe(strip)
    assert [tick.get_text() for tick in strip.axes[0].get_xticklabels()] == ["0", "1"]
    one = six.cards(data, [1], title="One moment")
    written = [text.get_text() for text in one.axes[0].texts]
    assert all(name in written for name in data.classes)


def test_words_of_two_colours_share_lines_and_strange_text_is_drawn_as_itself():
    lines = six._in_lines(["old", "$new$", "\u202eword", "last"], [False, True, False, True], 5)
    (kept, new), = lines
    assert kept.split() == ["old", "(U+202E)word"] and new.split() == ["$new$", "last"]
    assert len(kept) == len(new)
    assert len(six._in_lines(["word"] * 100, [False] * 100, 3)) == 3


def test_the_figure_of_the_evidence_shows_every_method_with_its_sets():
    names = ("evidence_docstrings_keywords", "quickstart", "classification_docstrings")
    evidence, demo, longer = (read(RESULTS / f"{name}.json") for name in names)
    methods = six.scores_by_size(evidence, demo, longer).set_index("label")
    assert methods.loc["keywords", "sets"] == 5 and methods.loc["keywords", "bytes"] == 816
    assert methods.loc["embeddings, float32", "steps"] == [3] * 5
    assert methods.loc["embeddings, float32, 1,350 outer steps", "sets"] == 1
    assert methods["mean"].between(0.1, 0.9).all() and methods.index.is_unique
    figure = six.accuracy_against_bytes(methods.reset_index(), title="A finding", upper={"all rows": 0.8}, chance=1 / 6,
                                        corpus_bytes=138157)
    described = plots.describe(figure)
    assert "A finding" in described and "keywords: 5 points" in described and "compressed corpus" in described
    assert figure.axes[0].get_xscale() == "log"
    assert "keywords: 0.54" in [text.get_text() for text in figure.axes[0].texts]


def test_labels_of_cards_must_be_soft(snapshots, world):
    start, moved, _ = snapshots
    hard = [dataclasses.replace(s, targets=torch.tensor(s.meta["labels"])) for s in (start, moved)]
    with pytest.raises(ValueError, match="soft"):
        six.read_cards(hard, world[1])
