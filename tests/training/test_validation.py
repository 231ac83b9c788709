"""What a validation measures, on a model that reproduces its images exactly, and what it says of unreadable ones."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from latentvae.data.pipeline import Batch
from latentvae.errors import UserError
from latentvae.images import PixelFormat
from latentvae.training.validation import MAX_PSNR, validate


class Copy(nn.Module):
    """moments: the image itself as the mean, and the given logvar; decoding is the identity."""

    def __init__(self, logvar: float = 0.0) -> None:
        super().__init__()
        self.logvar = nn.Parameter(torch.tensor(logvar))

    def moments(self, images):
        return torch.cat([images, self.logvar.expand(images.shape)], dim=1)

    def decode(self, latents):
        return SimpleNamespace(sample=latents)


def batches(*images, unreadable=()):
    stacked = torch.stack(images) if images else torch.empty(0)
    yield Batch(stacked, [str(n) for n in range(len(images))], list(range(len(images))), list(unreadable))


def measured(given, logvar=0.0, **options):
    return validate(Copy(logvar), given, PixelFormat(), device=torch.device("cpu"), **options)


def test_an_exact_reproduction_has_a_finite_psnr():
    result = measured(batches(torch.full((8, 8, 3), 255, dtype=torch.uint8)), num_pictures=1)
    assert result.metrics == {"psnr": MAX_PSNR, "active_channels": 0}  # one image, and every pixel of it the same
    assert result.picture.shape[-1] == 3


def test_latent_statistics_are_those_of_samples():
    """Half the elements at -1, half at 1, posterior variance 3: mean 0, variance 1 + 3."""
    black, white = (torch.full((8, 8, 3), value, dtype=torch.uint8) for value in (0, 255))
    latents = measured(batches(black, white), logvar=torch.tensor(3.0).log().item()).latents
    assert latents.mean == pytest.approx(0, abs=1e-6) and latents.std == pytest.approx(2, rel=1e-5)
    assert latents.scaling(has_shift=False) == {"scaling_factor": 0.5}
    assert latents.scaling(has_shift=True)["shift_factor"] == pytest.approx(0, abs=1e-6)


def test_a_channel_is_active_where_its_mean_varies_over_the_data():
    """Channels of three pictures: constant; varying over images; varying over positions, just above and just below."""
    spread = torch.tensor([26, -26]).repeat(32).reshape(8, 8)  # variance (26 / 127.5)^2 = 0.042 around 0
    faint = torch.tensor([12, -12]).repeat(32).reshape(8, 8)  # (12 / 127.5)^2 = 0.0089
    images = []
    for level in (0, 128, 255):
        images.append(torch.stack([torch.full((8, 8), level), 128 + spread, 128 + faint], dim=-1).to(torch.uint8))
    result = measured(batches(*images))
    assert result.latents.active_channels == result.metrics["active_channels"] == 2
    assert measured(batches(images[0])).latents.active_channels == 1


def test_statistics_of_each_channel_are_known():
    red = torch.zeros(8, 8, 3, dtype=torch.uint8)
    red[..., 0] = 255
    latents = measured(batches(red, torch.zeros_like(red)), logvar=math.log(3.0)).latents
    assert latents.channel_mean == pytest.approx([0, -1, -1], abs=1e-6)
    assert latents.channel_std == pytest.approx([2, 3**0.5, 3**0.5], rel=1e-5)


def test_an_uneven_share_of_each_process_gives_the_figures_of_one(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (7, 8, 8, 3), dtype=torch.uint8, generator=generator)

    class Coarse(Copy):
        def decode(self, latents):
            return SimpleNamespace(sample=latents.mul(4).round().div(4))

    def shares(*parts):
        """What the processes would exchange, by running each alone first."""
        told = [[] for _ in parts]

        def run(part):
            given = iter([next(batches(*part))] if len(part) else [])
            return validate(Coarse(), given, PixelFormat(), device=torch.device("cpu"))

        for part, kept in zip(parts, told, strict=True):
            monkeypatch.setattr("latentvae.training.validation.gather_object", lambda x, kept=kept: kept.append(x) or x)
            try:
                run(part)
            except UserError:
                assert not len(part)  # alone it has nothing to measure
        calls = iter(zip(*told, strict=True))
        monkeypatch.setattr(
            "latentvae.training.validation.gather_object", lambda x: [item for share in next(calls) for item in share]
        )
        return run(parts[0])

    alone = shares(images)
    spread = shares(images[:4], images[4:], images[:0])
    assert alone.num_images == spread.num_images == 7
    assert spread.metrics == alone.metrics
    assert spread.latents.std == pytest.approx(alone.latents.std, rel=1e-12)
    assert spread.latents.channel_mean == pytest.approx(alone.latents.channel_mean, rel=1e-12)
    assert shares(images[:4], images[4:6]).metrics != alone.metrics


def test_unreadable_images_are_told():
    image = torch.zeros(8, 8, 3, dtype=torch.uint8)
    assert measured(batches(image, unreadable=[("a.png", "is cut off")])).unreadable == [("a.png", "is cut off")]
    with pytest.raises(UserError, match=r"none of the 1 validation images is readable.*a\.png"):
        measured(batches(unreadable=[("a.png", "is cut off")]))
