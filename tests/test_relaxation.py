"""Relaxations against what their formulas promise: draws, limits and slopes."""

import pytest
import torch

from eigenlens.search.relaxation import HardConcrete, Penalised, Sharpened, relaxation

S = torch.tensor([-4.0, -1.5, 0.1, 0.7, 3.0], dtype=torch.float64)


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", ["sharpened", "hard_concrete", "penalised"])
@pytest.mark.parametrize("done", [0.0, 0.5, 1.0])
def test_gates_lie_between_shut_and_open_and_grow_with_s(name, done):
    relaxed = relaxation(name, sharpness=10.0)
    for z in (relaxed.strength(S, done), relaxed.sample(S, done, generator())):
        assert ((z >= 0) & (z <= 1)).all()
    strength = relaxed.strength(S, done)
    assert (strength.diff() >= 0).all()
    assert ((strength > 0.5) == (S > 0)).all()


def test_the_price_of_a_hard_concrete_gate_is_how_often_it_is_not_shut():
    hard, draws = HardConcrete(), 40_000
    for s, price in zip(S, hard.price(S, S, 0.0), strict=True):
        z = hard.sample(s.expand(draws), 0.0, generator())
        share = float((z > 0).double().mean())
        assert share == pytest.approx(float(price), abs=4 * (0.25 / draws) ** 0.5)
    middle = hard.sample(torch.zeros(draws), 0.0, generator())
    assert min((middle == 0).double().mean(), (middle == 1).double().mean()) > 0.05


def test_sharpening_ends_at_a_step_and_begins_at_a_sigmoid():
    sharp = Sharpened(100.0)
    torch.testing.assert_close(sharp.strength(S, 0.0), torch.sigmoid(S))
    open_or_shut = sharp.strength(S, 1.0)
    torch.testing.assert_close(open_or_shut, (S > 0).double(), atol=1e-4, rtol=0)


def test_the_penalty_drives_gates_from_the_middle_at_the_end_only():
    penalised = Penalised()
    z = torch.tensor([0.1, 0.9], dtype=torch.float64, requires_grad=True)
    slopes = [torch.autograd.grad(penalised.price(z, z, done).sum(), z)[0] for done in (0.0, 1.0)]
    assert (slopes[0] > 0).all()  # open gates cost
    assert slopes[1][0] > slopes[0][0]
    assert slopes[1][1] < 0


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'hard_concrete' or 'penalised'"):
        relaxation("soft", 1.0)
