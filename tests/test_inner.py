"""Inner optimisers against torch.optim, and recipes there and back."""

import pytest
import torch

import distillkit as dk
from distillkit.core.inner import from_recipe, set_parts


def quadratic(params):
    return sum((p.sin() * (i + 1)).square().sum() for i, p in enumerate(params.values()))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (dk.SGD(0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
        (dk.Momentum(0.05, decay=0.8), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8)),
        (dk.Momentum(0.05, nesterov=True), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True)),
        (dk.AdamW(0.01), lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0)),
        (
            dk.AdamW(0.02, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
            lambda p: torch.optim.AdamW(
                [{"params": [q for q in p if q.ndim > 1], "weight_decay": 0.1},
                 {"params": [q for q in p if q.ndim <= 1], "weight_decay": 0.0}],
                lr=0.02, betas=(0.8, 0.95), eps=1e-6,
            ),
        ),
    ],
)
def test_lands_where_torch_optim_lands(ours, theirs):
    draw = torch.Generator().manual_seed(0)
    start = {"w": torch.randn(4, 3, generator=draw, dtype=torch.float64),
             "b": torch.randn(3, generator=draw, dtype=torch.float64)}
    mirror = {n: p.clone().requires_grad_() for n, p in start.items()}
    optimizer = theirs(list(mirror.values()))
    params, state = start, ours.init(start)
    for _ in range(10):
        leaves = {n: p.detach().requires_grad_() for n, p in params.items()}
        grads = dict(zip(leaves, torch.autograd.grad(quadratic(leaves), list(leaves.values())), strict=True))
        params, state = ours.update({n: p.detach() for n, p in params.items()}, grads, state, ours.step_size)
        optimizer.zero_grad()
        quadratic(mirror).backward()
        optimizer.step()
        for name in start:
            assert (params[name] - mirror[name]).abs().max() <= 1e-12


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.1, "clip_norm": 0.5}, {"eps_root": 1e-4}])
def test_a_step_in_place_lands_where_the_pure_one_does(settings):
    optimizer, draw = dk.AdamW(0.02, betas=(0.8, 0.95), **settings), torch.Generator().manual_seed(1)
    pure = {n: torch.randn(shape, generator=draw, dtype=torch.float64) for n, shape in (("w", (4, 3)), ("b", (3,)))}
    ours = {n: p.clone() for n, p in pure.items()}
    state, other = optimizer.init(pure), optimizer.init(ours)
    for _ in range(6):
        grads = {n: torch.randn(p.shape, generator=draw, dtype=p.dtype) for n, p in pure.items()}
        pure, state = optimizer.update(pure, grads, state, torch.tensor(0.01))
        ours, other = optimizer.update_(ours, grads, other, torch.tensor(0.01))
        for name in pure:
            assert (pure[name] - ours[name]).abs().max() <= 1e-12
            assert (state["v"][name] - other["v"][name]).abs().max() <= 1e-12


def test_clipping_is_that_of_torch():
    grads = {"w": torch.tensor([3.0, 4.0], dtype=torch.float64), "b": torch.tensor([12.0], dtype=torch.float64)}
    params = {n: torch.zeros_like(g) for n, g in grads.items()}
    for limit in (1.0, 100.0):
        mirror = [torch.nn.Parameter(p.clone()) for p in params.values()]
        for p, g in zip(mirror, grads.values(), strict=True):
            p.grad = g.clone()
        torch.nn.utils.clip_grad_norm_(mirror, limit)
        new, _ = dk.SGD(1.0, clip_norm=limit).update(params, grads, {}, 1.0)
        assert all(torch.allclose(-new[n], p.grad) for n, p in zip(new, mirror, strict=True))


@pytest.mark.parametrize(
    "optimizer", [dk.SGD(0.3), dk.Momentum(0.1, nesterov=True, clip_norm=1.0), dk.AdamW(0.01, eps_root=1e-8, weight_decay=0.01)]
)
def test_a_recipe_gives_the_same_unroll_back(optimizer):
    import json

    unroll = dk.Unroll(5, optimizer=optimizer, batch_size=4)
    again = from_recipe(json.loads(json.dumps(unroll.recipe())))
    assert (again.steps, again.optimizer, again.batch_size) == (5, optimizer, 4)


def test_an_unknown_optimiser_in_a_recipe_is_named():
    with pytest.raises(ValueError, match="'Lion'"):
        from_recipe({"steps": 1, "batch_size": None, "optimizer": {"name": "Lion"}})


def test_micro_batches_hold_examples_of_like_length_without_common_padding():
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0]])
    embeds, targets = torch.randn(5, 4, 2), torch.arange(5)
    parts = list(set_parts(torch.tensor([4, 0, 3, 1, 2]), embeds, mask, targets, micro_batch=2, dropout=None))
    assert [part[2].tolist() for part in parts] == [[1, 3], [2, 4], [0]]
    assert [part[0] for part in parts] == [0.4, 0.4, 0.2]
    for _, batch, labels, _ in parts:
        end = int(max(mask[i].nonzero().max() for i in labels)) + 1
        assert torch.equal(batch["inputs_embeds"], embeds[labels, :end])
        assert torch.equal(batch["attention_mask"], mask[labels, :end])
    ((share, batch, labels, seed),) = set_parts(torch.tensor([2, 1]), embeds, mask, targets, micro_batch=None, dropout=None)
    assert share == 1 and labels.tolist() == [2, 1] and batch["inputs_embeds"].shape == (2, 2, 2), "one batch keeps its order"
