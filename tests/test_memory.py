"""Live bytes against counts made by hand (float32: four bytes a number)."""

import gc

import pytest
import torch

from distillkit.io.memory import LiveBytes


@pytest.fixture
def x():
    return torch.linspace(0.1, 0.2, 1000).requires_grad_()


def test_each_storage_counts_once_and_while_it_lives():
    with LiveBytes() as live:
        a = torch.ones(10, 10)
        b, c = a.t(), a[2:].view(-1)
        assert (live.total.now, live.total.peak) == (400, 400)
        d = b.reshape(-1)  # a transposed matrix has to be copied
        assert live.total.now == 800
        a.add_(1)
        del a, b
        assert live.total.now == 800  # c still holds the first
        del c
        assert live.total.now == 400
    assert live.total.peak == 800
    del d
    assert live.total.now == 0


def test_what_was_there_before_does_not_count():
    before = torch.ones(100)
    with LiveBytes() as live:
        view = before[::2]
        before.mul_(2)
        torch.add(before, 1, out=before)
        assert live.total.now == 0
        added = view + 1
        assert live.total.now == 200
        del before, view, added
        assert live.total.now == 0
    assert live.total.peak == 200


def test_tensors_made_from_numbers_count():
    with LiveBytes() as live:
        numbers = torch.tensor([1.0, 2.0, 3.0])
        assert live.total.now == 12
        del numbers
        assert live.total.now == 0


def test_a_graph_holds_what_it_saved(x):
    with LiveBytes() as live:
        y = x
        for _ in range(5):
            y = y.exp()  # saves its result, which no variable here names but the last
        assert live.total.now == 5 * 4000
        loss = y.sum()
        del y
        assert live.total.now == 5 * 4000 + 4
        (gradient,) = torch.autograd.grad(loss, x)
        assert live.total.now == 4000 + 4  # the graph is freed as it is walked: the gradient is left, and the loss
        del gradient, loss
        assert live.total.now == 0


def test_a_graph_dropped_unused_is_gone(x):
    with LiveBytes() as live:
        y = x.exp().exp().exp()
        assert live.total.now == 3 * 4000
        del y
        assert live.total.now == 0


def test_a_differentiable_gradient_holds_both_graphs(x):
    with LiveBytes() as live:
        loss = x.exp().exp().sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        # Saved: two results of exp, and what each was multiplied with on the way back; the gradient; the loss, and the
        # number 1 that the way back started with.
        assert live.total.now == 2 * 4000 + 2 * 4000 + 4 + 4
        (second,) = torch.autograd.grad(gradient.sum(), x)
        del gradient, second, loss
        assert live.total.now == 0


def test_functional_transforms_are_seen(x):
    def f(a):
        return a.exp().sum()

    point, along = x.detach(), torch.ones(1000)
    with LiveBytes() as live:
        _, product = torch.func.jvp(torch.func.grad(f), (point,), (along,))
        assert live.total.peak >= 2 * 4000
        del product, _
        gc.collect()
        assert live.total.now == 0


def test_shapes_are_tallied_apart():
    weight, batch = torch.ones(3, 5, requires_grad=True), torch.ones(7, 5)
    with LiveBytes(apart=[(3, 5)]) as live:
        hidden = batch @ weight.t()
        assert (live.apart.now, live.rest.now) == (0, 7 * 3 * 4)
        (gradient,) = torch.autograd.grad(hidden.sum(), weight)
        assert gradient.shape == (3, 5)
        assert live.apart.now == 3 * 5 * 4
        del gradient
        assert live.apart.now == 0
    assert live.apart.peak == 60
    assert live.total.peak >= live.rest.peak >= 84


def test_the_same_computation_gives_the_same_count(x):
    def peak():
        with LiveBytes() as live:
            torch.autograd.grad((x.exp() @ x.sin()) ** 2, x)
        return live.total.peak

    assert len({peak() for _ in range(3)}) == 1


def test_an_address_used_again_counts_again():
    with LiveBytes() as live:
        for size in (10, 20, 20):
            a = torch.empty(size)
            assert live.total.now == 4 * size
            del a
    assert (live.total.now, live.total.peak) == (0, 80)
