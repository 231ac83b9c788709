"""What a validation measures, on a model that reproduces its images exactly, and what it says of unreadable ones."""

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
    assert result.metrics == {"psnr": MAX_PSNR}
    assert result.picture.shape[-1] == 3


def test_latent_statistics_are_those_of_samples():
    """Half the elements at -1, half at 1, posterior variance 3: mean 0, variance 1 + 3."""
    black, white = (torch.full((8, 8, 3), value, dtype=torch.uint8) for value in (0, 255))
    latents = measured(batches(black, white), logvar=torch.tensor(3.0).log().item()).latents
    assert latents.mean == pytest.approx(0, abs=1e-6) and latents.std == pytest.approx(2, rel=1e-5)
    assert latents.scaling(has_shift=False) == {"scaling_factor": 0.5}
    assert latents.scaling(has_shift=True)["shift_factor"] == pytest.approx(0, abs=1e-6)


def test_unreadable_images_are_told():
    image = torch.zeros(8, 8, 3, dtype=torch.uint8)
    assert measured(batches(image, unreadable=[("a.png", "is cut off")])).unreadable == [("a.png", "is cut off")]
    with pytest.raises(UserError, match=r"none of the 1 validation images is readable.*a\.png"):
        measured(batches(unreadable=[("a.png", "is cut off")]))
