"""The posterior against diffusers' and against torch.distributions."""

import math

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch.distributions import Normal, kl_divergence

from latentvae.model.posterior import Posterior


@pytest.fixture
def moments():
    return torch.randn(3, 8, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_same_as_diffusers(moments):
    moments = moments * 20  # log variances beyond the clamp on both sides
    ours, theirs = Posterior(moments), DiagonalGaussianDistribution(moments)
    assert torch.equal(ours.mode(), theirs.mode())
    torch.testing.assert_close(ours.std, theirs.std)
    torch.testing.assert_close(ours.var, theirs.var)
    generator = torch.Generator()
    draws = [posterior.sample(generator.manual_seed(7)) for posterior in (ours, theirs)]
    torch.testing.assert_close(*draws)
    torch.testing.assert_close(ours.kl(), theirs.kl())
    latents = torch.zeros_like(ours.mean)
    torch.testing.assert_close(ours.nll(latents), theirs.nll(latents))


def test_kl_and_nll_are_those_of_the_normal_distribution(moments):
    posterior, other = Posterior(moments), Posterior(moments.flip(1) * 0.5 + 0.1)
    normal, other_normal = Normal(posterior.mean, posterior.std), Normal(other.mean, other.std)
    standard = Normal(torch.zeros_like(posterior.mean), torch.ones_like(posterior.mean))
    torch.testing.assert_close(posterior.kl(), kl_divergence(normal, standard).sum((1, 2, 3)))
    torch.testing.assert_close(posterior.kl(other), kl_divergence(normal, other_normal).sum((1, 2, 3)))
    latents = torch.ones_like(posterior.mean)
    torch.testing.assert_close(posterior.nll(latents), -normal.log_prob(latents).sum((1, 2, 3)))


def test_known_values():
    standard = Posterior(torch.zeros(2, 2, 1, 1))
    assert standard.kl().tolist() == [0.0, 0.0] and standard.kl(standard).tolist() == [0.0, 0.0]
    shifted = Posterior(torch.tensor([2.0, 0.0]).reshape(1, 2, 1, 1))
    assert shifted.kl().item() == pytest.approx(2.0)  # mean^2 / 2
    assert standard.nll(torch.zeros(2, 1, 1, 1))[0].item() == pytest.approx(0.9189385)  # log(2 pi) / 2


def test_samples_spread_as_std_says():
    moments = torch.tensor([3.0, 2 * math.log(0.5)]).reshape(1, 2, 1, 1).expand(1, 2, 200, 200)
    samples = Posterior(moments).sample(torch.Generator().manual_seed(0))
    assert samples.mean().item() == pytest.approx(3.0, abs=0.02)
    assert samples.std().item() == pytest.approx(0.5, abs=0.01)


def test_keeps_dtype_and_refuses_other_shapes(moments):
    assert Posterior(moments.bfloat16()).sample().dtype == torch.bfloat16
    for wrong in (torch.zeros(1, 3, 2, 2), torch.zeros(4, 2, 2)):
        with pytest.raises(ValueError, match="2D, h, w"):
            Posterior(wrong)
