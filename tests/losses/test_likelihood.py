import math

import pytest
import torch

from latentvae.losses.likelihood import LOGVAR_LIMIT, LearnedLogvar, learned_nll, optimal_logvar, optimal_nll


def test_the_learned_variance_starts_at_one_and_is_one_parameter():
    module = LearnedLogvar()
    assert module().item() == 0.0 and module().shape == ()
    assert {name: p.shape for name, p in module.named_parameters()} == {"logvar": ()}
    module().backward()
    assert module.logvar.grad.item() == 1.0
    assert module.double()().dtype == torch.float64


@pytest.mark.parametrize("value", [-1e6, -100.0, -12.0, -1.0, 3.0, 50.0, 1e6])
def test_the_clamp_keeps_a_range_an_order_and_a_gradient(value):
    module = LearnedLogvar()
    with torch.no_grad():
        module.logvar.fill_(value)
    result = module()
    assert abs(result.item()) <= LOGVAR_LIMIT and math.copysign(1, result.item()) == math.copysign(1, value)
    result.backward()
    assert 0 < module.logvar.grad.item() <= 1
    if abs(value) <= 3:
        assert result.item() == pytest.approx(value, rel=0.06)


def test_learned_nll_is_lowest_at_the_log_of_the_mean_error():
    errors = torch.tensor([0.1, 0.3], dtype=torch.float64)
    assert learned_nll(errors, torch.zeros(())).tolist() == [0.1, 0.3]
    assert learned_nll(errors, torch.tensor(math.log(2.0), dtype=torch.float64)).tolist() == pytest.approx(
        [0.05 + math.log(2), 0.15 + math.log(2)]
    )
    logvar = torch.tensor(math.log(0.2), dtype=torch.float64, requires_grad=True)
    learned_nll(errors, logvar).mean().backward()
    assert logvar.grad.item() == pytest.approx(0.0, abs=1e-12)


def test_the_learned_variance_finds_the_error_of_the_data():
    module = LearnedLogvar()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        learned_nll(torch.tensor([0.02, 0.04]), module()).mean().backward()
        optimizer.step()
    assert module().item() == pytest.approx(math.log(0.03), abs=1e-2)


def test_learned_nll_is_the_density_up_to_a_constant():
    """L1: a Laplace density. L2: twice a Gaussian one."""
    errors = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logvar = torch.tensor(-0.7, dtype=torch.float64)
    laplace = -torch.distributions.Laplace(0.0, logvar.exp()).log_prob(errors).mean()
    torch.testing.assert_close(learned_nll(errors.abs().mean()[None], logvar)[0] + math.log(2), laplace)
    gaussian = -torch.distributions.Normal(0.0, (0.5 * logvar).exp()).log_prob(errors).mean()
    ours = learned_nll(errors.square().mean()[None], logvar)[0]
    torch.testing.assert_close(0.5 * (ours + math.log(2 * math.pi)), gaussian)


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_optimal_nll_is_the_density_under_its_own_best_scale(kind):
    errors = 0.5 * torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pixel = errors.abs().mean() if kind == "l1" else errors.square().mean()

    def density(scale):
        if kind == "l1":
            return -torch.distributions.Laplace(0.0, scale).log_prob(errors).mean().item()
        return -torch.distributions.Normal(0.0, scale).log_prob(errors).mean().item()

    best = pixel if kind == "l1" else pixel.sqrt()
    constant = 1 + math.log(2) if kind == "l1" else 0.5 * (1 + math.log(2 * math.pi))
    assert optimal_nll(pixel[None], kind).item() + constant == pytest.approx(density(best), abs=0.01)  # the 8-bit step
    assert all(density(best) < density(best * factor) for factor in (0.9, 1.1))
    assert optimal_logvar(pixel[None], kind).exp().item() == pytest.approx(pixel.item(), rel=0.01)


def test_optimal_values_and_gradients():
    pixel = torch.tensor([0.04, 0.0], dtype=torch.float64, requires_grad=True)
    rounding = (2 / 255) ** 2 / 12
    value = optimal_nll(pixel, "l2")
    assert value.tolist() == pytest.approx([0.5 * math.log(0.04 + rounding), 0.5 * math.log(rounding)])
    value.sum().backward()  # as with a fixed variance equal to the error: MSE / (2 sigma^2)
    assert pixel.grad.tolist() == pytest.approx([0.5 / (0.04 + rounding), 0.5 / rounding])
    for kind in ("l1", "charbonnier"):
        value = optimal_nll(torch.tensor([0.04, 0.0], dtype=torch.float64), kind)
        assert value.tolist() == pytest.approx([math.log(0.04 + 2 / 1020), math.log(2 / 1020)])


def test_the_floor_of_optimal_is_what_rounding_to_8_bits_costs():
    values = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rounded = ((values + 1) * 127.5).round() / 127.5 - 1
    nothing = torch.zeros(1, dtype=torch.float64)
    assert optimal_logvar(nothing, "l2").exp().item() == pytest.approx(
        (values - rounded).square().mean().item(), rel=0.01
    )
    assert optimal_logvar(nothing, "l1").exp().item() == pytest.approx((values - rounded).abs().mean().item(), rel=0.01)
