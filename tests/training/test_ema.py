import copy
import math

import pytest
import torch
from torch import nn

from latentvae.training.ema import ExponentialMovingAverage


def network(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)).to(dtype, memory_format=torch.channels_last)


def move(model: nn.Module, step: int) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * step)


def test_the_formula():
    model = network(torch.float64)
    average = ExponentialMovingAverage(model, 0.99, warmup_steps=5)
    expected = model[0].weight.detach().clone()
    for step in range(1, 30):
        move(model, step)
        average.update()
        decay = 0.99 * (1 - math.exp(-step / 5))
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
        assert average.current_decay == decay
    torch.testing.assert_close(average.state_dict()["0.weight"], expected, rtol=1e-12, atol=1e-12)


def test_the_default_warm_up_forgets_the_start():
    average = ExponentialMovingAverage(network(), 0.9999)
    assert average.current_decay == 0
    average.update()
    assert average.current_decay == pytest.approx(0.9999 / 2000, rel=1e-3)
    constant = ExponentialMovingAverage(network(), 0.5, warmup_steps=0)
    constant.update()
    assert constant.current_decay == 0.5


def test_frozen_parameters_stay_bit_identical():
    model = network()
    model[1].requires_grad_(False)
    average = ExponentialMovingAverage(model, 0.9, warmup_steps=7)
    for step in range(50):
        move(model, step)
        average.update()
    assert torch.equal(average.state_dict()["1.weight"], model[1].weight)
    assert not torch.equal(average.state_dict()["0.weight"], model[0].weight)


def test_half_precision_weights_are_averaged_in_float32():
    model = network(torch.bfloat16)
    average = ExponentialMovingAverage(model, 0.9)
    average.update()
    assert all(tensor.dtype == torch.float32 for tensor in average.state_dict().values())
    with average.applied():
        assert model[0].weight.dtype == torch.bfloat16
    assert ExponentialMovingAverage(network(torch.float64), 0.9).state_dict()["0.weight"].dtype == torch.float64


def test_applied_swaps_and_restores_also_after_an_error():
    model = network()
    average = ExponentialMovingAverage(model, 0.9)
    move(model, 1)
    average.update()
    move(model, 3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="in the middle"), average.applied():
        assert torch.equal(model[0].weight, average.state_dict()["0.weight"])
        raise RuntimeError("in the middle")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_saved_and_resumed_is_bit_for_bit_uninterrupted():
    model = network()
    average = ExponentialMovingAverage(model, 0.99)
    for step in range(4):
        move(model, step)
        average.update()
    saved = {name: tensor.clone() for name, tensor in average.state_dict().items()}
    twin = copy.deepcopy(model)
    resumed = ExponentialMovingAverage(twin, 0.99)
    resumed.load_state_dict(saved, average.num_updates)
    for step in range(4, 8):
        for network_, average_ in ((model, average), (twin, resumed)):
            move(network_, step)
            average_.update()
    assert all(torch.equal(t, resumed.state_dict()[name]) for name, t in average.state_dict().items())


def test_mistakes_are_refused():
    average = ExponentialMovingAverage(network(), 0.9)
    with pytest.raises(ValueError, match="decay"):
        ExponentialMovingAverage(network(), 1.0)
    with pytest.raises(ValueError, match="other parameters"):
        average.load_state_dict({"0.weight": torch.zeros(1)}, 1)
    with pytest.raises(ValueError, match="float64"):
        average.load_state_dict({name: t.double() for name, t in average.state_dict().items()}, 1)
