import pytest
import torch
from pydantic import ValidationError
from torch import nn

from latentvae.errors import UserError
from latentvae.losses.discriminator import DiscriminatorConfig, PatchDiscriminator


def test_the_default_is_the_70_pixel_patchgan():
    discriminator = PatchDiscriminator()
    convolutions = [m for m in discriminator.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convolutions] == [64, 128, 256, 512, 1]
    assert discriminator(torch.zeros(1, 3, 64, 64)).shape == (1, 1, 6, 6)

    images = torch.zeros(1, 3, 256, 256, requires_grad=True)
    convolutional = nn.Sequential(*(m for m in discriminator.layers if not isinstance(m, nn.GroupNorm)))
    convolutional(images)[0, 0, 15, 15].backward()
    seen = images.grad.abs().sum((0, 1)).nonzero()
    assert (seen.amax(0) - seen.amin(0) + 1).tolist() == [70, 70]


def test_initialisation():
    torch.manual_seed(0)
    weights = torch.cat([m.weight.flatten() for m in PatchDiscriminator().modules() if isinstance(m, nn.Conv2d)])
    assert weights.mean().abs() < 1e-4 and abs(weights.std() - 0.02) < 1e-4


def test_an_image_does_not_depend_on_its_neighbours():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(config=DiscriminatorConfig(base_channels=8)).double()
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64)
    alone = torch.cat([discriminator(image[None]) for image in images])
    torch.testing.assert_close(discriminator(images), alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("base_channels", [4, 8, 12, 64])
def test_groups_hold_at_least_four_channels(base_channels):
    discriminator = PatchDiscriminator(5, DiscriminatorConfig(base_channels=base_channels))
    for module in discriminator.modules():
        if isinstance(module, nn.GroupNorm):
            assert module.num_channels // module.num_groups >= 4
    assert discriminator(torch.zeros(1, 5, 24, 24)).shape == (1, 1, 1, 1)


@pytest.mark.parametrize("num_layers", [1, 3, 4])
def test_the_minimum_size_is_the_smallest_that_works(num_layers):
    discriminator = PatchDiscriminator(3, DiscriminatorConfig(base_channels=4, num_layers=num_layers))
    size = discriminator.config.minimum_size
    assert discriminator(torch.zeros(1, 3, size, size)).shape == (1, 1, 1, 1)
    with pytest.raises(UserError, match=f"{size - 1} pixels a side; .* needs {size}"):
        discriminator(torch.zeros(1, 3, size, size - 1))


def test_config_bounds():
    with pytest.raises(ValidationError):
        DiscriminatorConfig(base_channels=6)
    with pytest.raises(ValidationError):
        DiscriminatorConfig(layers=3)
