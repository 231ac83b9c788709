"""Latents and images are disturbed alike, by amounts that the seed and the place in the run decide."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from latentvae.errors import UserError
from latentvae.losses.config import LossConfig
from latentvae.training.perturbation import (
    FULL_SCALE,
    Transform,
    draw_latent_noise,
    draw_transform,
    equivariance_error,
    minimum_side,
    smallest_scale,
)
from tests.training.updaters import tiny_autoencoder


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def loss(**fields):
    return LossConfig(**({"perceptual": "none", "equivariance": 0.5} | fields))


def draws(config, count=4000, size=(32, 32), seed=0):
    return [
        draw_transform(config, seed=seed, images_seen=64 * step, latent_size=size, downsample_factor=8)
        for step in range(count)
    ]


def test_full_scale_without_a_turn_is_the_identity():
    x = noise(2, 4, 6, 8)
    assert Transform().latents(x) is x and Transform(32, 0).images(x, 2) is x


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_turns_are_quarters_counter_clockwise_and_images_follow_latents(turns):
    corner = torch.zeros(1, 1, 2, 3)
    corner[0, 0, 0, 0] = 1  # top left => bottom left, bottom right, top right
    turned = Transform(32, turns).latents(corner)
    assert turned.shape == ((1, 1, 2, 3) if turns == 2 else (1, 1, 3, 2))
    row, column = {1: (-1, 0), 2: (-1, -1), 3: (0, -1)}[turns]
    assert turned[0, 0, row, column] == 1 and turned.sum() == 1
    images = F.interpolate(corner, scale_factor=8, mode="nearest")
    assert torch.equal(Transform(32, turns).images(images, 8), F.interpolate(turned, scale_factor=8, mode="nearest"))


@pytest.mark.parametrize(
    ("scale", "size", "expected"),
    [(16, (32, 32), (16, 16)), (9, (8, 16), (2, 5)), (31, (8, 8), (8, 8)), (1, (4, 4), (1, 1)), (20, (4, 4), (3, 3))],
)
def test_sizes_are_rounded_and_images_decode_to_the_same(scale, size, expected):
    latents, images = Transform(scale).latents(noise(1, 4, *size)), noise(1, 3, 8 * size[0], 8 * size[1])
    assert latents.shape[2:] == expected
    assert Transform(scale).images(images, 8).shape[2:] == (8 * expected[0], 8 * expected[1])
    assert Transform(scale, 1).images(images, 8).shape[2:] == (8 * expected[1], 8 * expected[0])


def test_shrinking_keeps_a_constant_and_averages_what_falls_together():
    flat = torch.full((1, 1, 8, 8), 0.25, dtype=torch.float64)
    torch.testing.assert_close(Transform(11).latents(flat), flat[..., :3, :3])
    stripes = torch.ones(1, 1, 32, 32, dtype=torch.float64)
    stripes[..., ::2] = -1  # finer than a quarter of the size can show: without antialiasing it would alias
    assert Transform(8).latents(stripes)[..., 1:-1].abs().max() < 0.05
    line = noise(1, 1, 1, 4)  # the triangle filter of radius 2 about the centres 1 and 3, by hand
    weights = torch.tensor([[3.0, 3, 1, 0], [0, 1, 3, 3]], dtype=torch.float64) / 7
    torch.testing.assert_close(Transform(16).latents(line)[0, 0, 0], weights @ line[0, 0, 0])


def test_shrinking_and_turning_commute():
    x = noise(2, 3, 16, 24)
    for turns in (1, 2, 3):
        torch.testing.assert_close(
            Transform(13, turns).latents(x), Transform(13).latents(torch.rot90(x, turns, (2, 3)).contiguous())
        )


def test_half_of_the_steps_are_transformed_by_every_scale_and_turn_alike():
    drawn = draws(loss())
    found = [transform for transform in drawn if transform is not None]
    assert abs(len(found) / len(drawn) - 0.5) < 0.03
    assert {transform.scale for transform in found} == set(range(8, 32))
    assert all(abs(sum(t.turns == turns for t in found) / len(found) - 1 / 3) < 0.04 for turns in (1, 2, 3))
    assert draws(loss(), 50) == drawn[:50] != draws(loss(), 50, seed=1)


def test_the_extremes_of_the_probability_and_no_rotation():
    assert set(draws(loss(equivariance=0.0), 50)) == {None}
    drawn = draws(loss(equivariance=1.0, equivariance_rotation=False, equivariance_scales=(32, 32)), 50)
    assert set(drawn) == {Transform(32, 0)}


def test_no_image_is_shrunk_below_what_the_loss_can_judge():
    config = loss(perceptual="squeeze", ssim_weight=1.0)
    assert minimum_side(config) == 17 and minimum_side(loss(ssim_weight=1.0)) == 11 and minimum_side(loss()) == 1
    assert minimum_side(loss(adversarial_weight=0.5, ssim_weight=1.0)) == 24
    assert smallest_scale(config, latent_side=8, downsample_factor=8) == 10  # 2.5 latents, rounded up: 24 pixels
    small = {t.side(8) * 8 for t in draws(config, size=(20, 8)) if t is not None}
    assert min(small) == 24
    with pytest.raises(UserError, match="images of 16 pixels shrunk to 16/32 are smaller than the 17"):
        draws(config.model_copy(update={"equivariance_scales": (8, 16)}), 1, size=(2, 2))
    with pytest.raises(ValueError, match=r"equivariance_scales is \[9, 8\]"):
        loss(equivariance_scales=(9, 8))


def test_latent_noise_is_a_mixture_that_the_position_decides():
    mixed = draw_latent_noise(3.0, (4, 8, 8), seed=0, positions=range(500))
    assert 0 <= mixed.share.min() < 0.02 and 0.98 < mixed.share.max() < 1
    eps = mixed.noise / (3 * mixed.share.view(-1, 1, 1, 1).clamp_min(1e-6))
    assert abs(eps.std() - 1) < 0.01 and abs(eps.mean()) < 0.01
    latents = noise(500, 4, 8, 8)
    expected = (1 - mixed.share.double().view(-1, 1, 1, 1)) * latents + mixed.noise.double()
    torch.testing.assert_close(mixed(latents), expected)
    other = draw_latent_noise(3.0, (4, 8, 8), seed=0, positions=[499, 3])
    assert torch.equal(other.noise, mixed.noise[[499, 3]]) and torch.equal(other.share, mixed.share[[499, 3]])
    assert not torch.equal(draw_latent_noise(3.0, (4, 8, 8), seed=1, positions=[3]).noise[0], mixed.noise[3])


class AverageAndRepeat:
    """Exactly equivariant under quarter turns, and lossless on images made of 2 x 2 blocks. `skew` breaks it."""

    downsample_factor = 2

    def __init__(self, skew=0.0):
        self.skew = skew

    def moments(self, images):
        mean = F.avg_pool2d(images, 2)
        return torch.cat([mean, torch.zeros_like(mean)], dim=1)

    def decode(self, latents):
        return SimpleNamespace(sample=F.interpolate(latents, scale_factor=2, mode="nearest") + self.skew)


QUARTERS = [Transform(FULL_SCALE, turns) for turns in (1, 2, 3)]


def test_the_error_of_an_equivariant_autoencoder_is_zero_and_of_another_its_square():
    blocks = F.interpolate(noise(2, 3, 4, 6), scale_factor=2, mode="nearest")
    assert torch.equal(equivariance_error(AverageAndRepeat(), blocks, QUARTERS), torch.zeros(2, dtype=torch.float64))
    skewed = equivariance_error(AverageAndRepeat(0.1), blocks, QUARTERS)
    torch.testing.assert_close(skewed, torch.full((2,), 0.01, dtype=torch.float64))


def test_the_error_of_a_network_is_that_of_each_image_alone():
    vae = tiny_autoencoder()
    images = noise(3, 3, 16, 24).float().clamp(-1, 1)
    with torch.no_grad():
        error = equivariance_error(vae, images)
        torch.testing.assert_close(error[1:2], equivariance_error(vae, images[1:2]))
    assert error.shape == (3,) and (error > 0).all()
