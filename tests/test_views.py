"""What is looked at is what is there: views against counts and formulas done by hand, figures against what they are given."""

import dataclasses
import html
import math
import re
import sys
import types

import numpy as np
import pytest
import torch

import distillkit as dk
from distillkit.text.projection import allowed_tokens
from distillkit.view import measures as views
from distillkit.view import set_figures as view_plots
from pictures import prompt_figures


@pytest.fixture(scope="module")
def start(world):
    task, student = world
    return dk.DistilledSet.from_real(task, student, per_class=1, length=10)


def moved(distilled, change, steps=None):
    """The set with its free positions moved by ``change [l, d]`` or a number, after so many outer steps."""
    embeds = distilled.embeds + change * distilled.free.unsqueeze(-1)
    meta = {k: v for k, v in distilled.meta.items() if k != "text"} | ({"recipe": {"outer_steps": steps}} if steps else {})
    return dataclasses.replace(distilled, embeds=embeds, tokens=None, meta=meta)


# Maps


def cloud(n=40, d=5, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def test_umap_is_imported_when_asked_for_and_told_the_seed(monkeypatch):
    """The real one compiles for half a minute."""
    told, threads = [], torch.get_num_threads()

    class UMAP:
        def __init__(self, **options):
            told.append(options)

        def fit(self, points):
            torch.set_num_threads(threads + 1)  # as numba does
            return self

    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=UMAP))
    assert isinstance(views.fitted_umap(cloud(17), seed=3), UMAP) and torch.get_num_threads() == threads
    views.fitted_umap(cloud(9))
    assert [options["n_neighbors"] for options in told] == [15, 8], "no more neighbours than there are other points"
    assert told[0] == {"n_neighbors": 15, "random_state": 3, "n_jobs": 1}


# Neighbours


def test_neighbour_overlap_by_hand():
    """Points on a line: a a . b b . . . a.  The nearest other of each: a, a, b, b, and of the last one b."""
    points = np.array([[0.0], [1], [3], [4], [8]])
    found = views.neighbour_overlap(points, ["a", "a", "b", "b", "a"], 1, metric="l2")
    assert found.share == pytest.approx(4 / 5)
    # By chance: an "a" has 2 of its own among 4 others, a "b" has 1.
    assert found.chance == pytest.approx((3 * 2 / 4 + 2 * 1 / 4) / 5)
    # With two neighbours: a(1: a, 3: b), a(0: a, 3: b), b(4: b, 1: a), b(3: b, 1: a), a(4: b, 3: b).
    assert views.neighbour_overlap(points, ["a", "a", "b", "b", "a"], 2, metric="l2").share == pytest.approx(4 / 10)


def test_all_neighbours_are_chance_and_cosine_ignores_length():
    points, groups = cloud(30), np.arange(30) % 3
    found = views.neighbour_overlap(points, groups, 29)
    assert found.share == pytest.approx(found.chance) == pytest.approx(9 / 29)
    stretched = points * np.linspace(0.1, 9, 30)[:, None]
    assert views.neighbour_overlap(stretched, groups, 4) == views.neighbour_overlap(points, groups, 4)
    points, groups = [[1, 0], [9, 0], [1, 1], [7, 7]], ["→", "→", "↗", "↗"]  # by direction, or by length
    assert [views.neighbour_overlap(points, groups, 1, metric=metric).share for metric in ("cosine", "l2")] == [1, 0]


def test_a_copy_is_a_neighbour_and_a_point_is_not_its_own():
    assert views.neighbour_overlap(np.zeros((4, 2)) + 1, [0, 0, 0, 0], 3).share == 1
    assert views.neighbour_overlap([[0.0, 1], [1, 0]], [0, 1], 1).share == 0


def test_preservation():
    flat = cloud(50, 2)
    turned = flat @ np.array([[0, 1], [-1, 0]]) * 3 + 7
    assert views.preservation(flat, turned, 6) == 1
    line, on_map = np.array([0, 1.1, 2.1, 3])[:, None], np.array([0, 2.2, 1, 3.3])[:, None] * [1, 0]
    near, seen = [{1, 2}, {0, 2}, {1, 3}, {1, 2}], [{1, 2}, {2, 3}, {0, 1}, {1, 2}]
    assert views.preservation(line, on_map, 2) == sum(len(a & b) / 2 for a, b in zip(near, seen)) / 4 == 0.75
    some = np.array([3, 0])
    assert views.preservation(line, on_map, 2, rows=some) == sum(len(near[i] & seen[i]) / 2 for i in some) / 2
    assert views.preservation(np.zeros((5, 2)), np.zeros((5, 2)), 4, rows=np.arange(5)) == 1, "a point is not its own neighbour"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: views.neighbour_overlap(cloud(), [0] * 39, 3), r"\[40, 39\]"),
        (lambda: views.neighbour_overlap(cloud(), [0] * 40, 40), r"k must be a whole number from 1 to 39 \(the other points\), "
                                                                "not 40"),
        (lambda: views.neighbour_overlap(cloud(), [0] * 40, 3, metric="l1"), "metric must be one of l2, cosine, not 'l1'"),
        (lambda: views.preservation(cloud(), cloud(39, 2), 3), r"\[40, 39\]"),
    ],
)
def test_neighbours_that_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Words


def test_distance_to_words(world, start):
    _, student = world
    table = student.embedding
    allowed = allowed_tokens(student.tokenizer, len(table)).nonzero().squeeze(1)
    apart = torch.cdist(table[allowed], table[allowed], compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    found = views.distance_to_words(start, student)
    assert found.yardstick == pytest.approx(float(apart.min(1).values.median()), rel=1e-4)
    assert found.distances.tolist() == [0] * int(start.free.sum()), "a word is at no distance from itself"
    assert found.tokens.tolist() == start.tokens[start.free].tolist()

    direction = torch.nn.functional.normalize(torch.ones(student.width), dim=0)
    away = moved(start, 1e-3 * direction)
    assert views.distance_to_words(away, student).distances == pytest.approx(1e-3, rel=1e-3)


# Attention


def test_attention_is_the_softmax_by_hand(world, start):
    """The second head of both layers of the tiny BERT, from its own matrices."""
    _, student = world
    found = views.attention(student, start)
    m, l, _ = start.embeds.shape
    assert found.shape == (m, 2, 2, l, l)
    body = student.module.bert
    with torch.no_grad():
        states = body(inputs_embeds=start.embeds, output_hidden_states=True).hidden_states
        for layer, hidden in enumerate(states[:2]):
            own = body.encoder.layer[layer].attention.self
            q, k = (part(hidden)[..., 16:32] for part in (own.query, own.key))
            by_hand = (q @ k.mT / 4).softmax(-1)  # √16
            assert start.mask.all() and np.allclose(found[:, layer, 1], by_hand, atol=1e-6)


@pytest.mark.parametrize("name", ["bert-base-uncased", "microsoft/deberta-v3-base", "answerdotai/ModernBERT-base", "gpt2",
                                  "google/gemma-3-270m"])
def test_rows_sum_to_one_and_padding_gets_nothing(task, standin_hub, name):
    student = dk.load_student(name, task)
    batch = task.batch(student.tokenizer, "train", range(12))
    mask = batch["attention_mask"].bool().numpy()
    assert not mask.all() and mask.any(1).all()
    found = views.attention(student, batch)
    present = np.broadcast_to(mask[:, None, None], found.shape[:-1])
    assert np.allclose(found.sum(-1), present, atol=1e-5)
    absent = ~(mask[:, None, None, :, None] & mask[:, None, None, None, :])
    assert not found[np.broadcast_to(absent, found.shape)].any()
    if student.causal:
        assert not np.triu(found, 1).any(), "in the examples' own order, nobody looks ahead"
    row = int(mask.sum(1).argmin())  # padding changes nothing: the shortest example by itself
    n = mask[row].sum()
    alone = {name: batch[name][row : row + 1, :n] for name in ("input_ids", "attention_mask")}
    assert np.allclose(views.attention(student, alone)[0], found[row, :, :, :n, :n], atol=1e-5)


def test_parameters_reach_the_attention_and_weights_stay(world, start):
    _, student = world
    before = {name: p.clone() for name, p in student.module.named_parameters()}
    params = dataclasses.replace(student, weights="random").init(0)
    assert not np.allclose(views.attention(student, start), views.attention(student, start, params), atol=1e-3)
    own = {name: before[name] for name in params}
    assert np.array_equal(views.attention(student, start), views.attention(student, start, own))
    assert all(torch.equal(p, before[name]) for name, p in student.module.named_parameters())


@pytest.mark.parametrize("source", ["bert-base-uncased", "gpt2", "distilbert-base-uncased", "answerdotai/ModernBERT-base",
                                    "google/gemma-3-270m"])
def test_a_fused_student_is_eager_for_one_pass(task, standin_hub, source):
    batches, found = [], []
    for kind in ("eager", "sdpa"):
        student = dk.load_student(source, task, attention=kind)
        batches.append(task.batch(student.tokenizer, "train", range(4)))
        found.append(views.attention(student, batches[-1], student.init(1)))
        assert student.module.config._attn_implementation == kind
    assert np.allclose(*found, atol=1e-6)


def test_adapters_keep_their_attention(task, standin_hub):
    student = dk.load_student("bert-base-uncased", task, trainable="lora", attention="sdpa")
    plain = dk.load_student("bert-base-uncased", task)
    batch = task.batch(plain.tokenizer, "train", range(4))
    assert np.allclose(views.attention(student, batch), views.attention(plain, batch), atol=1e-6), "B is 0 at first"


def ragged():
    """Two examples of 4 positions, the second with 3: weights of one layer and two heads, uniform and on oneself."""
    mask = np.array([[1, 1, 1, 1], [1, 1, 1, 0]])
    present = mask[:, None, None, :, None] * mask[:, None, None, None, :]
    even = present / present.sum(-1, keepdims=True).clip(1)
    own = np.eye(4) * mask[:, None, None, :, None]
    return np.concatenate([even, own], 2), mask


def test_entropy_of_uniform_attention_is_the_logarithm_of_the_length():
    weights, mask = ragged()
    found = views.attention_entropy(weights, mask)
    assert found.shape == (2, 1, 2)
    assert found[:, 0, 0] == pytest.approx([math.log(4), math.log(3)]) and found[:, 0, 1].tolist() == [0, 0]


def test_shares_by_hand():
    weights, mask = ragged()
    special = np.array([[1, 0, 0, 1], [1, 0, 1, 1]])  # the last one is special, but not there
    found = views.attention_shares(weights, torch.tensor(mask), torch.tensor(special))
    assert found.special[:, 0, 0] == pytest.approx([2 / 4, 2 / 3]) and found.content[:, 0, 0] == pytest.approx([2 / 4, 1 / 3])
    assert found.own[:, 0, 0] == pytest.approx([1 / 4, 1 / 3])
    assert found.previous[:, 0, 0] == pytest.approx([1 / 4, 1 / 3]) == found.next[:, 0, 0]
    assert found.own[:, 0, 1].tolist() == [1, 1] and not found.previous[:, 0, 1].any() and not found.next[:, 0, 1].any()
    assert found.special[:, 0, 1] == pytest.approx([2 / 4, 2 / 3])

    back = np.zeros((1, 1, 1, 3, 3))
    back[0, 0, 0, [0, 1, 2], [0, 0, 1]] = 1  # everyone looks one back, the first at itself
    found = views.attention_shares(back, np.ones((1, 3)), np.zeros((1, 3)))
    assert (found.previous.item(), found.next.item(), found.own.item()) == (1, 0, pytest.approx(1 / 3))


def test_weights_that_do_not_fit_the_mask():
    weights, mask = ragged()
    for call in (views.attention_entropy, lambda w, m: views.attention_shares(w, m, m)):
        with pytest.raises(ValueError, match=r"weights of shape \(2, 1, 2, 4, 4\) do not fit a mask of shape \(2, 3\)"):
            call(weights, mask[:, :3])
        with pytest.raises(ValueError, match="do not fit"):
            call(weights[0], mask)


# History


def test_history_by_hand(world, start):
    """The first free position goes to another word and back, the second to a third word; the rest stays."""
    _, student = world
    first, second = start.free[0].nonzero().squeeze(1)[:2].tolist()
    words = allowed_tokens(student.tokenizer, len(student.embedding)).nonzero().squeeze(1)
    x, y = [int(w) for w in words if int(w) not in start.tokens[0].tolist()][:2]

    def snapshot(at_first, at_second, step):
        embeds = start.embeds.clone()
        for place, word in ((first, at_first), (second, at_second)):
            if word is not None:
                embeds[0, place] = student.embedding[word]
        targets = start.targets + step * torch.eye(2)
        return dataclasses.replace(
            start, embeds=embeds, targets=targets, meta=start.meta | {"recipe": {"outer_steps": 5 * step}}
        )

    states = [snapshot(None, None, 0), snapshot(x, None, 1), snapshot(None, y, 2)]
    found = views.history(states, student)
    assert found.steps.tolist() == [0, 5, 10] and np.array_equal(found.free, start.free)
    assert found.flipped.nonzero()[0].tolist() == [1, 2, 2] and found.flipped.nonzero()[2].tolist() == [first, first, second]
    assert found.tokens[:, 0, first].tolist() == [start.tokens[0, first], x, start.tokens[0, first]]
    assert found.tokens[:, 0, second].tolist() == [start.tokens[0, second]] * 2 + [y]
    assert (found.tokens[:, ~found.free] == -1).all()
    n = int(start.free.sum())
    assert found.away.tolist() == pytest.approx([0, 1 / n, 1 / n])
    way = float((student.embedding[x] - start.embeds[0, first]).norm())
    assert found.moved[:, 0, first] == pytest.approx([0, way, 0]) and found.moved.sum(2)[:, 1].tolist() == [0, 0, 0]
    assert np.allclose(found.labels, torch.stack([s.targets.softmax(-1) for s in states]))


def test_history_of_hard_labels_and_without_recipes(world, start):
    _, student = world
    hard = dataclasses.replace(start, targets=torch.tensor(start.meta["labels"]))
    found = views.history([hard, hard], student)
    assert found.labels is None and found.steps.tolist() == [0, 1] and not found.moved.any()


def test_histories_that_cannot_be(world, start):
    task, student = world
    with pytest.raises(ValueError, match="at least two snapshots, not 1"):
        views.history([start], student)
    shorter = dk.DistilledSet.from_real(task, student, per_class=1, length=8)
    with pytest.raises(ValueError, match=r"snapshot 1 .*\(2, 8, 32\)"):
        views.history([start, shorter], student)


# Figures


def test_characters_without_a_glyph_are_named(recwarn):
    assert view_plots.drawn("##ä車$x$") == r"##äU+8ECA\$x\$"
    figure = prompt_figures.prompt_and_labels([("車", "a")], "車?", {"without": {"a": -1.0}}, "a")
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


# Tables

HOSTILE = ["a | b\nc\r\n\n| --- |", "<script>alert('x')</script> & &amp;", "`code` *b* _i_ ~s~ [l](http://x.y) ![p](q) $x^2$",
           "\\\\ \\input{x} {} # % ^ ~ _ & $", "[x] *", "--- ``q'' \"z\"", "ü 漢 \u2028 \t end"]


def rows(text):
    return [{"text": text, "label": text, "probabilities": [0.25, 0.75]}]


@pytest.mark.parametrize("text", HOSTILE)
def test_markdown_tables_are_escaped(text):
    found = view_plots.label_table(rows(text), ["a|b", "<c>"])
    lines = found.splitlines()
    assert len(lines) == 3 and lines[1] == "| --- | --- | ---: | ---: |"
    assert all(line.count("|") == 5 for line in lines), "a bar in a text would be one cell more"
    assert lines[0] == "| class | text | a&#124;b | &lt;c&gt; |"
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells[2:] == ["0.25", "0.75"] and cells[0] == cells[1]
    assert not set("<>*_`[]~$\\") & set(cells[0]), "nothing left that Markdown, HTML or a formula could begin with"
    assert html.unescape(cells[0]) == " ".join(text.split()), "and it still says what it said"


@pytest.mark.parametrize("text", HOSTILE)
def test_latex_tables_are_escaped(text):
    found = view_plots.label_table(rows(text), ["a_b", "50 %"], format="latex")
    body = found.splitlines()[4]
    assert found.startswith("\\begin{tabular}{lp{0.45\\linewidth}rr}\n") and found.endswith("\\end{tabular}\n")
    assert found.splitlines()[2] == r"class & text & a\_b & 50 \% \\"
    assert len(re.findall(r"(?<!\\)&", body)) == 3 and body.endswith(r" & 0.25 & 0.75 \\")
    cell = body.removesuffix(r" & 0.25 & 0.75 \\").split(" & ")[0]
    for character, latex in sorted(view_plots.LATEX.items(), key=lambda pair: -len(pair[1])):
        cell = cell.replace(latex, f"\0{ord(character)}\0")
    assert not set("\\{}$&%#_~^") & set(cell), "every special character was one of the table's"
    assert re.sub("\0(\\d+)\0", lambda found: chr(int(found[1])), cell) == " ".join(text.split())


def test_tables_that_cannot_be():
    with pytest.raises(ValueError, match="format must be one of markdown, latex, not 'rst'"):
        view_plots.label_table(rows("x"), ["a", "b"], format="rst")
    with pytest.raises(ValueError, match=r"rows \[0\] .*3 classes"):
        view_plots.label_table(rows("x"), ["a", "b", "c"])
