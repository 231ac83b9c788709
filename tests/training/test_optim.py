import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentvae.errors import UserError
from latentvae.training.optim import (
    learning_rate_at,
    load_optimizer_tensors,
    make_optimizer,
    nonfinite_terms,
    optimizer_tensors,
    set_learning_rate,
)

OPTIONS = {"learning_rate": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


def network(seed=0, dtype=torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 5, 3, bias=False))
    return layers.to(dtype, memory_format=torch.channels_last)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        images = torch.rand(
            2, 3, 9, 9, generator=torch.Generator().manual_seed(step), dtype=next(model.parameters()).dtype
        )
        set_learning_rate(optimizer, 1e-2 / (1 + step))
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()


def test_norms_and_biases_are_not_decayed():
    model = network()
    optimizer = make_optimizer(model.named_parameters(), **OPTIONS)
    assert [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups] == [(2, 0.1), (3, 0.0)]
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, old in zip(model.parameters(), before, strict=True):
        factor = 1 - 1e-2 * 0.1 if parameter.ndim > 1 else 1.0
        torch.testing.assert_close(parameter.detach(), old * factor)


def test_frozen_parameters_are_left_out():
    model = network()
    model[0].requires_grad_(False)
    optimizer = make_optimizer(model.named_parameters(), **OPTIONS)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 3
    with pytest.raises(UserError, match="trainable"):
        make_optimizer(model.requires_grad_(False).named_parameters(), **OPTIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fused_update_is_adamw(dtype):
    """Loshchilov & Hutter 2019, algorithm 2, written out."""
    model = network(dtype=dtype)
    optimizer = make_optimizer(model.named_parameters(), **OPTIONS)
    weight = model[0].weight
    expected, m, v = weight.detach().clone(), 0.0, 0.0
    for step in range(1, 4):
        weight.grad = torch.sin(torch.arange(weight.numel(), dtype=dtype)).view_as(weight) * step
        m = 0.9 * m + 0.1 * weight.grad
        v = 0.95 * v + 0.05 * weight.grad**2
        expected = expected * (1 - 1e-2 * 0.1)
        expected -= 1e-2 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saved_and_resumed_is_bit_for_bit_uninterrupted(tmp_path, dtype):
    straight = network(dtype=dtype)
    optimizer = make_optimizer(straight.named_parameters(), **OPTIONS)
    train(straight, optimizer, range(3))
    tensors, options = optimizer_tensors(optimizer, straight.named_parameters())
    save_file(tensors, tmp_path / "optimizer.safetensors")
    (tmp_path / "optimizer.json").write_text(json.dumps(options, allow_nan=False))
    weights = {name: p.detach().clone() for name, p in straight.named_parameters()}
    train(straight, optimizer, range(3, 7))

    resumed = network(seed=1, dtype=dtype)
    resumed.load_state_dict(weights)
    other = make_optimizer(resumed.named_parameters(), **OPTIONS)
    train(resumed, other, range(50, 51))  # state of its own, to be replaced
    resumed.load_state_dict(weights)
    loaded = load_file(tmp_path / "optimizer.safetensors")
    kept = {name: tensor.clone() for name, tensor in loaded.items()}
    load_optimizer_tensors(
        other, resumed.named_parameters(), loaded, json.loads((tmp_path / "optimizer.json").read_text())
    )
    assert other.param_groups[0]["lr"] == 1e-2 / 3 and other.param_groups[0]["betas"] == (0.9, 0.95)
    train(resumed, other, range(3, 7))
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    ours, theirs = (optimizer_tensors(o, m.named_parameters())[0] for o, m in ((optimizer, straight), (other, resumed)))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(torch.equal(loaded[name], kept[name]) for name in kept)  # training wrote into no tensor of the caller


def test_memory_layouts_change_nothing():
    """Weights in channels_last with contiguous gradients and moments: the fused kernel alone would mix up elements."""
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = network().to(memory_format=layout)
        optimizer = make_optimizer(model.named_parameters(), **OPTIONS)
        for step in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.sin(torch.arange(parameter.numel()) + step).view(parameter.shape)
            optimizer.step()
            if step == 1:  # the layout of the weights is changed when the moments exist
                model.to(memory_format=torch.channels_last)
        results.append([p.detach().contiguous() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_state_names_and_an_optimizer_that_never_stepped():
    model = network()
    optimizer = make_optimizer(model.named_parameters(), **OPTIONS)
    tensors, options = optimizer_tensors(optimizer, model.named_parameters())
    assert tensors == {} and options["optimizer"] == "AdamW"
    other = make_optimizer(model.named_parameters(), **OPTIONS)
    load_optimizer_tensors(other, model.named_parameters(), tensors, options)
    train(model, optimizer, range(1))
    tensors, _ = optimizer_tensors(optimizer, model.named_parameters())
    assert {"exp_avg/0.weight", "exp_avg_sq/1.bias", "step/3.weight"} < set(tensors)


def state_of(model: nn.Module) -> tuple[dict[str, Tensor], dict]:
    optimizer = make_optimizer(model.named_parameters(), **OPTIONS)
    train(model, optimizer, range(1))
    return optimizer_tensors(optimizer, model.named_parameters())


def test_state_of_another_optimizer_is_refused():
    tensors, options = state_of(network())
    model = network()
    optimizer = make_optimizer(model.named_parameters(), **OPTIONS)

    partly = network()
    partly[0].requires_grad_(False)
    with pytest.raises(UserError, match=r"0\.bias"):
        load_optimizer_tensors(
            make_optimizer(partly.named_parameters(), **OPTIONS), partly.named_parameters(), tensors, options
        )
    with pytest.raises(UserError, match="SGD"):
        load_optimizer_tensors(torch.optim.SGD(model.parameters()), model.named_parameters(), tensors, options)
    with pytest.raises(UserError, match="parameter_dtype"):
        load_optimizer_tensors(
            optimizer,
            model.named_parameters(),
            {name: t.double() if t.ndim else t for name, t in tensors.items()},
            options,
        )
    missing = {name: t for name, t in tensors.items() if name != "exp_avg_sq/3.weight"}
    with pytest.raises(UserError, match="no such trainable parameter"):
        load_optimizer_tensors(
            optimizer, model.named_parameters(), {**missing, "exp_avg/9.weight": torch.zeros(2)}, options
        )
    with pytest.raises(UserError, match="do not belong together"):
        load_optimizer_tensors(optimizer, model.named_parameters(), missing, options)


def rate(images_seen, **changes):
    options = {"learning_rate": 2.0, "warmup_images": 100, "total_images": 1100} | {"schedule": "cosine"}
    return learning_rate_at(images_seen, **(options | {"final_learning_rate": 0.1} | changes))


def test_the_schedule():
    assert [rate(n) for n in (0, 25, 50)] == [0.0, 0.5, 1.0]
    assert rate(100) == 2.0
    assert rate(600) == pytest.approx(2.0 * 0.55)
    assert rate(1100) == pytest.approx(0.2) and rate(5000) == pytest.approx(0.2)
    assert rate(350) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))
    assert [rate(n, schedule="constant") for n in (50, 100, 9999)] == [1.0, 2.0, 2.0]
    assert rate(1, warmup_images=0, schedule="constant") == 2.0
    assert rate(500, warmup_images=2000) == 0.5 and rate(2000, warmup_images=2000) == pytest.approx(0.2)


def test_the_schedule_follows_another_measure_of_progress():
    assert rate(150, progress=1.0) == pytest.approx(0.2)
    assert rate(150, progress=600 / 1100) == pytest.approx(rate(600))
    assert rate(150, progress=0.0) == 2.0


def test_non_finite_terms_are_named_with_their_images():
    fine = {"reconstruction": torch.tensor([1.0, 2.0, 3.0]), "kl": torch.zeros(3)}
    assert nonfinite_terms(fine) == [] and nonfinite_terms({}) == []
    bad = fine | {
        "perceptual": torch.tensor([torch.nan, 1.0, torch.inf]),
        "adversarial": torch.tensor([0.0, -torch.inf, 0.0]),
    }
    assert nonfinite_terms(bad) == [("perceptual", [0, 2]), ("adversarial", [1])]
