"""From embeddings to words: the nearest token by brute force, in bounded memory, and nothing but words."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import distillkit as dk
from distillkit.text import projection
from distillkit.text.projection import allowed_tokens


@pytest.fixture
def learned(world):
    """A set whose free positions have moved off their tokens."""
    found = dk.DistilledSet.from_real(*world, per_class=2, length=10)
    noise = torch.randn(found.embeds.shape, generator=torch.Generator().manual_seed(0))
    meta = found.meta | {"recipe": {"steps": 3}}
    embeds = found.embeds + 0.03 * noise * found.free.unsqueeze(-1)
    return dataclasses.replace(found, embeds=embeds, tokens=None, step_sizes=torch.tensor([0.1, 0.2, 0.3]), meta=meta)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brute_force(queries, table, metric, allowed):
    """All distances in float64, one pair at a time in the definition's own words."""
    q, t = queries.double().unsqueeze(1), table.double().unsqueeze(0)
    if metric == "l2":
        found = (q - t).square().sum(-1).sqrt()
    else:
        found = 1 - (q * t).sum(-1) / (q.square().sum(-1).sqrt() * t.square().sum(-1).sqrt())
    return found.masked_fill(~allowed, float("inf")).sort(dim=1)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize(("queries_at_once", "rows_at_once"), [(1, 1), (3, 3), (3, 10**6), (10**6, 3), (1024, 4096)])
def test_nearest_is_nearest(monkeypatch, metric, k, queries_at_once, rows_at_once):
    monkeypatch.setattr(projection, "QUERIES", queries_at_once)
    monkeypatch.setattr(projection, "ROWS", rows_at_once)
    queries, table, allowed = draw(11, 8), draw(50, 8, seed=1), draw(50, seed=2) > -0.5
    ids, distances = dk.nearest_tokens(queries, table, k=k, metric=metric, allowed=allowed)
    expected, order = brute_force(queries, table, metric, allowed)
    assert torch.equal(ids, order[:, :k])
    assert torch.allclose(distances.double(), expected[:, :k], atol=1e-5)


def test_all_rows_are_allowed_by_default():
    table = draw(50, 8)
    ids, distances = dk.nearest_tokens(table, table)
    assert torch.equal(ids.squeeze(1), torch.arange(50)) and distances.max() < 1e-2


def test_half_precision_tables_are_searched_in_float32():
    """Rows a hundredth apart, far from the origin: bfloat16 sums would not tell them apart."""
    table = (100 + draw(64, 16)).bfloat16().unique(dim=0)
    queries = table.float() + 0.01
    expected = brute_force(queries, table.float(), "l2", torch.ones(len(table), dtype=torch.bool))[1][:, :1]
    assert torch.equal(dk.nearest_tokens(queries, table)[0], expected)


class Largest(TorchDispatchMode):
    """Notes the most elements that any operation's output owns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_memory_is_bounded(metric):
    """128,000 tokens, 2,000 positions: a full distance matrix would be 256 million numbers, a copy of the table 8."""
    table = draw(500, 64).repeat(256, 1)
    table[-1] = 5.0
    queries = torch.cat([draw(1999, 64, seed=1), torch.full((1, 64), 4.9)])
    with Largest() as seen:
        ids, _ = dk.nearest_tokens(queries, table, metric=metric)
    assert seen.elements <= 1024 * 4096
    assert ids[-1] == 127_999 and len(ids) == 2000


@pytest.mark.parametrize(("given", "message"), [
    ({"metric": "dot"}, "metric must be one of l2, cosine, not 'dot'"),
    ({"table": draw(50, 7)}, "queries are 8 wide, the embedding table 7"),
    ({"k": 51}, "k=51 neighbours asked for, but only 50 tokens are allowed"),
    ({"k": 2, "allowed": torch.arange(50) == 3}, "only 1 tokens are allowed"),
])
def test_bad_searches_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        dk.nearest_tokens(**{"queries": draw(3, 8), "table": draw(50, 8)} | given)


# --- sets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_project(world, learned, metric):
    student = world[1]
    found = dk.project(learned, student, metric=metric)
    assert torch.equal(found.embeds, student.embedding[found.tokens])
    allowed = allowed_tokens(student.tokenizer, len(student.embedding))
    _, order = brute_force(learned.embeds[learned.free], student.embedding, metric, allowed)
    assert torch.equal(found.tokens[learned.free], order[:, 0])
    fixed = found.tokens[~learned.free].reshape(4, 2).tolist()
    assert fixed == [[student.tokenizer.cls_token_id, student.tokenizer.sep_token_id]] * 4
    assert found.meta["projection"]["metric"] == metric and found.meta["projection"]["mean_distance"] > 0
    assert learned.tokens is None and "projection" not in learned.meta


def test_what_projection_keeps(world, learned):
    found = dk.project(learned, world[1])
    for name in ("targets", "step_sizes", "mask", "free"):
        assert torch.equal(getattr(found, name), getattr(learned, name))
    assert found.meta["recipe"] == {"steps": 3} and found.meta["classes"] == ["neg", "pos"]


def test_the_text_is_the_tokens(world, learned):
    tokenizer, found = world[1].tokenizer, dk.project(learned, world[1])
    rows = found.to_text()
    for text, row, free in zip(rows["text"], found.tokens, found.free):
        assert text == tokenizer.decode(row[free].tolist()) and not any(t in text for t in tokenizer.all_special_tokens)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("name", ["bert-base-uncased", "roberta-base", "offline:minilm"])
def test_real_tokens_project_to_themselves(world, standin_hub, name, metric):
    student = dk.load_student(name, world[0])
    real = dk.DistilledSet.from_real(world[0], student, per_class=2, length=8)
    found = dk.project(dataclasses.replace(real, tokens=None), student, metric=metric)
    assert torch.equal(found.tokens, real.tokens) and torch.equal(found.embeds, real.embeds)
    assert found.to_text().to_list() == real.to_text().to_list()
    assert found.meta["projection"]["mean_distance"] < 2e-3


def test_projecting_twice_changes_nothing(world, learned):
    once = dk.project(learned, world[1])
    assert torch.equal(dk.project(once, world[1]).tokens, once.tokens)


def test_positions_that_are_not_there_stay_padding(world, learned):
    learned.mask[0, 6:] = False
    learned.free[0, 6:] = False
    assert dk.project(learned, world[1]).tokens[0, 6:].eq(world[1].tokenizer.pad_token_id).all()


def test_special_and_unused_tokens_are_no_words(world):
    """In MiniLM's vocabulary; an embedding that *is* an unused token's goes to another."""
    student = dk.load_student("offline:minilm", world[0])
    tokenizer = student.tokenizer
    allowed = allowed_tokens(tokenizer, len(student.embedding))
    names = tokenizer.convert_ids_to_tokens((~allowed).nonzero().squeeze(1).tolist())
    assert sorted(set(names) - {f"[unused{n}]" for n in range(994)}) == ["[CLS]", "[MASK]", "[PAD]", "[SEP]", "[UNK]"]
    assert len(names) == 994 + 5 and allowed.sum() == 30522 - 999
    start = dk.DistilledSet.from_real(world[0], student, per_class=1, length=8)
    start.embeds[start.free] = student.embedding[[tokenizer.convert_tokens_to_ids("[unused7]")]]
    start.embeds[0, 1] = student.embedding[tokenizer.mask_token_id]
    assert allowed[dk.project(start, student).tokens[start.free]].all()


def test_rows_of_the_table_without_a_token_are_no_words(world):
    tokenizer = world[1].tokenizer
    assert not allowed_tokens(tokenizer, len(tokenizer) + 8)[len(tokenizer) :].any()
    assert len(allowed_tokens(tokenizer, 10)) == 10


def test_bad_projections_are_named(world, learned):
    with pytest.raises(ValueError, match="metric must be one of l2, cosine, not 'l1'"):
        dk.project(learned, world[1], metric="l1")
    narrow = dataclasses.replace(learned, embeds=learned.embeds[..., :16])
    with pytest.raises(ValueError, match="embeddings are 16 wide, student 'bert-base-uncased' wants 32"):
        dk.project(narrow, world[1])
