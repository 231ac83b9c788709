import math

import pytest
import torch
from torch import nn

from latentvae.losses.terms import (
    LDMWeights,
    anchor_distance,
    charbonnier,
    from_ldm_units,
    hinge_discriminator,
    hinge_generator,
    kl,
    l1,
    l2,
    non_saturating_discriminator,
    non_saturating_generator,
    to_ldm_units,
)


def charbonnier_of_lai(images, reconstructions):
    return charbonnier(images, reconstructions, 1e-3)


def test_known_values():
    images = torch.zeros(2, 3, 4, 4)
    reconstructions = torch.stack([torch.full((3, 4, 4), 0.5), torch.full((3, 4, 4), -0.25)])
    assert l1(images, reconstructions).tolist() == [0.5, 0.25]
    assert l2(images, reconstructions).tolist() == [0.25, 0.0625]


@pytest.mark.parametrize("term", [l1, l2, charbonnier_of_lai])
def test_a_constant_difference_costs_the_same_at_every_resolution(term):
    values = [term(torch.zeros(1, 3, size, size), torch.full((1, 3, size, size), 0.3)).item() for size in (8, 32, 128)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-6)


@pytest.mark.parametrize("term", [l1, l2, charbonnier_of_lai])
def test_half_precision_is_reduced_in_float32_and_float64_stays(term):
    x = torch.rand(2, 3, 64, 64)
    assert term(x.bfloat16(), x.bfloat16() * 0.5).dtype == torch.float32
    assert term(x.double(), x.double()).dtype == torch.float64


@pytest.mark.parametrize("term", [l1, l2, charbonnier_of_lai])
def test_shapes_that_would_broadcast_are_refused(term):
    with pytest.raises(ValueError, match="reconstructions"):
        term(torch.zeros(2, 1, 4, 4), torch.zeros(2, 3, 4, 4))


def test_charbonnier_values():
    errors = torch.tensor([0.0, 3.0, 4.0, 1e-6], dtype=torch.float64).view(4, 1, 1, 1).expand(4, 3, 2, 5)
    value = charbonnier(torch.zeros_like(errors), errors, eps=4.0)
    assert value.tolist() == pytest.approx([0.0, 1.0, math.sqrt(32) - 4, 1.25e-13], rel=1e-9)
    small = charbonnier(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 1e-6), eps=1e-3)
    assert small.item() == pytest.approx(5e-10, rel=1e-5)  # sqrt(e^2 + eps^2) - eps has no digit left in float32
    assert charbonnier(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), -0.5), 1e-6).item() == pytest.approx(
        0.5, rel=1e-5
    )


def test_charbonnier_is_smooth_where_l1_has_a_corner():
    error = torch.tensor([0.0, 1e-3, -1.0], dtype=torch.float64).view(3, 1, 1, 1).requires_grad_()
    charbonnier(torch.zeros(3, 1, 1, 1, dtype=torch.float64), error, 1e-3).sum().backward()
    expected = [0.0, 1 / math.sqrt(2), -1 / math.sqrt(1 + 1e-6)]  # error / sqrt(error^2 + eps^2)
    assert error.grad.flatten().tolist() == pytest.approx(expected, rel=1e-12)


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


def test_free_bits_hold_each_channel_of_each_image():
    """Channels of 0, 0.5 and 2 nats per element: the first two may carry 1 nat for nothing."""
    means = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64).view(1, 3, 1, 1).expand(2, 3, 4, 6)  # KL: mean^2 / 2
    moments = torch.cat([means, torch.zeros_like(means)], dim=1)
    moments[1] = 0
    assert kl(moments).tolist() == pytest.approx([2.5 / 3, 0.0])
    assert kl(moments, free_bits=1.0).tolist() == pytest.approx([(1 + 1 + 2) / 3, 1.0])
    assert kl(moments, free_bits=0.1).tolist() == pytest.approx([(0.1 + 0.5 + 2) / 3, 0.1])


def test_free_bits_look_at_a_whole_channel_and_free_it_of_pressure():
    generator = torch.Generator().manual_seed(0)
    moments = torch.randn(3, 8, 4, 6, dtype=torch.float64, generator=generator).requires_grad_()
    torch.testing.assert_close(kl(moments, free_bits=1e-9), kl(moments), rtol=1e-12, atol=0)  # no channel is below
    halves = torch.cat([kl(moments[:1], 0.9), kl(moments[1:], 0.9)])
    torch.testing.assert_close(kl(moments, 0.9), halves, rtol=0, atol=0)
    with torch.no_grad():
        moments[:, 0].mul_(1e-3), moments[:, 4].mul_(1e-3)  # mean and logvar of the first channel
    kl(moments, 0.1).sum().backward()
    assert moments.grad[:, [0, 4]].abs().sum() == 0
    assert all(moments.grad[:, [index, index + 4]].abs().sum() > 0 for index in (1, 2, 3))


def test_the_anchor_measures_scaled_means():
    moments = torch.zeros(2, 4, 3, 5, dtype=torch.float64)
    moments[0, :2], moments[:, 2:] = 0.5, 9.0  # the log variances have no part in it
    anchor = torch.full((2, 2, 3, 5), 0.25, dtype=torch.float64)
    assert anchor_distance(moments, anchor).tolist() == [0.0625, 0.0625]
    assert anchor_distance(moments, anchor, latent_scale=2.0).tolist() == [0.25, 0.25]
    assert anchor_distance(moments, moments[:, :2], 2.0).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="anchor"):
        anchor_distance(moments, anchor[:1])


def test_non_saturating_values():
    real, fake = torch.tensor([0.0, 2.0]).view(1, 1, 1, 2), torch.tensor([0.0, -3.0]).view(1, 1, 1, 2)

    def cross_entropy(logit, target):
        return nn.functional.binary_cross_entropy_with_logits(logit, torch.full_like(logit, target)).item()

    expected = 0.5 * (cross_entropy(real, 1.0) + cross_entropy(fake, 0.0))
    assert non_saturating_discriminator(real, fake).item() == pytest.approx(expected)
    assert non_saturating_generator(fake).item() == pytest.approx(cross_entropy(fake, 1.0))
    undecided = torch.zeros(3, 1, 2, 5)
    assert non_saturating_generator(undecided).tolist() == pytest.approx([math.log(2)] * 3)
    assert non_saturating_discriminator(undecided, undecided).tolist() == pytest.approx([math.log(2)] * 3)
    sure = torch.full((1, 1, 1, 1), -200.0, requires_grad=True)
    non_saturating_generator(sure).sum().backward()
    assert sure.grad.item() == -1.0  # where log(1 - sigmoid) would have none


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


def test_anchor_distance_with_a_scale_per_channel():
    mean = torch.tensor([1.0, 2.0]).view(1, 2, 1, 1).expand(3, 2, 4, 4)
    moments, anchor = torch.cat([mean, torch.zeros_like(mean)], 1), torch.zeros(3, 2, 4, 4)
    assert anchor_distance(moments, anchor, [2.0, 0.5]).tolist() == [2.5] * 3  # (2^2 + 1^2) / 2
    assert anchor_distance(moments, anchor, 2.0).tolist() == [10.0] * 3
