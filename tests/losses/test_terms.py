import math

import pytest
import torch

from latentvae.losses.terms import (
    LDMWeights,
    from_ldm_units,
    hinge_discriminator,
    hinge_generator,
    kl,
    l1,
    l2,
    to_ldm_units,
)


def test_known_values():
    images = torch.zeros(2, 3, 4, 4)
    reconstructions = torch.stack([torch.full((3, 4, 4), 0.5), torch.full((3, 4, 4), -0.25)])
    assert l1(images, reconstructions).tolist() == [0.5, 0.25]
    assert l2(images, reconstructions).tolist() == [0.25, 0.0625]


@pytest.mark.parametrize("term", [l1, l2])
def test_a_constant_difference_costs_the_same_at_every_resolution(term):
    values = [term(torch.zeros(1, 3, size, size), torch.full((1, 3, size, size), 0.3)).item() for size in (8, 32, 128)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


@pytest.mark.parametrize("term", [l1, l2])
def test_half_precision_is_reduced_in_float32_and_float64_stays(term):
    x = torch.rand(2, 3, 64, 64)
    assert term(x.bfloat16(), x.bfloat16() * 0.5).dtype == torch.float32
    assert term(x.double(), x.double()).dtype == torch.float64


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match="reconstructions"):
        l1(torch.zeros(2, 1, 4, 4), torch.zeros(2, 3, 4, 4))


def test_kl_against_the_closed_form_and_per_element():
    mean, logvar = 0.7, -1.2
    expected = 0.5 * (mean**2 + math.exp(logvar) - 1 - logvar)  # nats of one element
    for size in (2, 16):
        moments = torch.cat([torch.full((3, 4, size, size), mean), torch.full((3, 4, size, size), logvar)], dim=1)
        torch.testing.assert_close(kl(moments), torch.full((3,), expected))
    assert kl(torch.zeros(2, 8, 4, 4)).tolist() == [0.0, 0.0]
    assert kl(torch.ones(2, 8, 4, 4, dtype=torch.bfloat16)).dtype == torch.float32


def test_kl_agrees_with_torch_distributions():
    moments = torch.randn(2, 8, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, logvar = moments.chunk(2, 1)
    normal = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    standard = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(normal, standard).mean((1, 2, 3))
    torch.testing.assert_close(kl(moments), expected, rtol=1e-12, atol=1e-12)


def test_hinge_values():
    real, fake = torch.tensor([2.0, 0.5]).view(1, 1, 1, 2), torch.tensor([-3.0, 1.0]).view(1, 1, 1, 2)
    assert hinge_discriminator(real, fake).tolist() == [0.5 * (0.25 + 1.0)]  # relu(1-real): 0, .5; relu(1+fake): 0, 2
    assert hinge_generator(fake).tolist() == [1.0]


def test_ldm_units_of_the_published_f8c4():
    ours = from_ldm_units(LDMWeights(), downsample_factor=8, latent_channels=4, resolution=256)
    assert ours.kl_weight == pytest.approx(2.083e-8, rel=1e-3)
    assert ours.adaptive_max == pytest.approx(0.0509, rel=1e-3)
    assert ours.perceptual_weight == 1.0
    back = to_ldm_units(ours, downsample_factor=8, latent_channels=4, resolution=256)
    assert (back.perceptual_weight, back.kl_weight, back.adaptive_max) == pytest.approx((1.0, 1e-6, 1e4))


def test_ldm_units_describe_the_same_loss():
    """LDM's sums with its weights, divided by the pixels of an image, are our means with ours."""
    generator = torch.Generator().manual_seed(1)
    images, reconstructions = torch.rand(2, 2, 3, 32, 32, generator=generator, dtype=torch.float64)
    moments = torch.randn(2, 8, 4, 4, generator=generator, dtype=torch.float64)
    theirs = LDMWeights(kl_weight=1e-3)
    ours = from_ldm_units(theirs, downsample_factor=8, latent_channels=4, resolution=32)
    latents = moments.numel() / 2
    ldm = ((images - reconstructions).abs().sum() + theirs.kl_weight * kl(moments).mean() * latents) / len(images)
    loss = l1(images, reconstructions).mean() + ours.kl_weight * kl(moments).mean()
    torch.testing.assert_close(loss, ldm / images[0].numel(), rtol=1e-12, atol=0)
