"""Weights are as they were after a block, bit for bit, also after an error in it."""

import pytest
import torch
from torch import nn

from eigenlens.weights import requiring_grad, restored


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8).clone()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_bit_is_restored_also_through_views_and_twice(dtype):
    linear = nn.Linear(5, 3).to(dtype)
    with torch.no_grad():
        linear.weight[0, :3] = torch.tensor([float("nan"), -0.0, float("inf")])
    before, place = bits(linear.weight), linear.weight.data_ptr()

    def fail():
        with restored([linear.weight.T]), torch.no_grad():
            linear.weight.T[1] += 1
            with restored([linear.weight, linear.bias]):
                linear.weight.zero_()
            assert not torch.equal(bits(linear.weight), before)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(bits(linear.weight), before)
    assert linear.weight.data_ptr() == place


def test_gradients_reach_weights_inside_and_none_are_left():
    linear = nn.Linear(4, 2)
    linear.weight.requires_grad_(False)
    linear.bias.grad = kept = torch.ones(2)

    def fail():
        with requiring_grad(linear.parameters()):
            linear(torch.ones(1, 4)).sum().backward()
            assert torch.equal(linear.weight.grad, torch.ones(2, 4))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert linear.weight.grad is None
    assert linear.bias.grad is kept
    assert (linear.weight.requires_grad, linear.bias.requires_grad) == (False, True)
