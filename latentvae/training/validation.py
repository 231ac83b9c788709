"""Images that are measured and pictured while training runs."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from latentvae.data.pipeline import Batch
from latentvae.errors import UserError
from latentvae.evaluation.metrics import psnr
from latentvae.images import PixelFormat, from_model, image_grid, to_model
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.model.posterior import Posterior
from latentvae.training.perturbation import equivariance_error

MAX_PSNR = 100.0  # dB; an image reproduced exactly counts as this, since infinity has no mean and no place in JSON
ACTIVE_VARIANCE = 0.01  # of the posterior means over the data: a unit above it is used (Burda et al. 2016, section 5.2)


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of sampled raw latents: Var(z) = Var(mean) + E[posterior variance].

    Attributes:
        mean, std: over all elements.
        channel_mean, channel_std: of each channel, over images and positions.
        active_channels: how many channels carry something of the image: their posterior mean varies over images and
            positions with more than ACTIVE_VARIANCE, and is not the prior's whatever the image.
    """

    mean: float
    std: float
    channel_mean: tuple[float, ...] = ()
    channel_std: tuple[float, ...] = ()
    active_channels: int = 0

    def scaling(self, *, has_shift: bool) -> dict[str, float]:
        """config.json values that give normalized latents unit variance (LDM, section G: one over the std).

        Families without a shift (SD 1.x, SDXL) divide by the std alone; with one (SD3, FLUX) the mean goes first.
        """
        if not self.std > 0:
            raise ValueError("the latents are constant: their scaling cannot be measured")
        values = {"scaling_factor": round(1 / self.std, 6)}
        return values | {"shift_factor": round(self.mean, 6)} if has_shift else values


@dataclass(frozen=True)
class ValidationResult:
    """What one pass over the validation images gave; the same on every process but for the picture.

    Attributes:
        metrics: psnr (dB, mean over images), lpips (where the run has a perceptual term), equivariance_error (where it
            trains that), and active_channels.
        num_images: how many images the metrics are means over.
        latents: statistics of the raw latents.
        unreadable: (key, reason) of the images that could not be used.
        picture: HWC uint8, originals above reconstructions; None on processes but the first, or if not asked for.
    """

    metrics: dict[str, float]
    num_images: int
    latents: LatentStatistics
    unreadable: list[tuple[str, str]]
    picture: np.ndarray | None


def validate(
    vae: AutoencoderKL,
    batches: Iterator[Batch],
    pixels: PixelFormat,
    *,
    device: torch.device,
    perceptual: nn.Module | None = None,
    num_pictures: int = 0,
    has_equivariance: bool = False,
) -> ValidationResult:
    """Reconstruct every image through the posterior mode, without autocast, and measure.

    Integer pixels are clamped and rounded before PSNR (EVALUATION protocol). Each process passes its own share of the
    images; the figures are over all of them, each image once.
    """
    rows: list[dict[str, Any]] = []
    sums: list[_LatentSums] = []
    unreadable: list[tuple[str, str]] = []
    pictures: list[np.ndarray] = []
    parameter = next(vae.parameters())
    with torch.no_grad():
        for batch in batches:
            unreadable += batch.unreadable
            if not batch.keys:
                continue
            images = to_model(batch.images.to(device), pixels).to(parameter.dtype)
            posterior = Posterior(vae.moments(images))
            reconstructions = vae.decode(posterior.mode()).sample
            restored = from_model(reconstructions, pixels).cpu()  # figures in float64, which MPS does not have
            decibel = psnr(batch.images, restored, data_range=pixels.high - pixels.low).clamp(max=MAX_PSNR)
            figures = {"psnr": decibel.tolist()}
            if perceptual is not None:
                figures["lpips"] = perceptual(images, reconstructions.clamp(-1, 1)).tolist()
            if has_equivariance:
                figures["equivariance_error"] = equivariance_error(vae, images).tolist()
            rows += [dict(zip(figures, values, strict=True)) for values in zip(*figures.values(), strict=True)]
            sums.append(_LatentSums.of(posterior))
            room = max(0, num_pictures - len(pictures) // 2)
            for pair in zip(batch.images[:room].numpy(), restored[:room].numpy(), strict=True):
                pictures += pair
    rows, sums, unreadable = gather_object(rows), gather_object(sums), gather_object(unreadable)
    if not rows:
        raise UserError(f"none of the {len(unreadable)} validation images is readable: {unreadable[:3]}")
    # fsum rounds once, so the order in which the processes are gathered changes nothing.
    metrics = {name: math.fsum(row[name] for row in rows) / len(rows) for name in rows[0]}
    latents = _statistics(sums)
    metrics["active_channels"] = latents.active_channels
    picture = None
    if pictures:
        shown = [_displayable(array, pixels) for array in pictures[0::2] + pictures[1::2]]
        picture = image_grid(shown, columns=len(pictures) // 2)
    return ValidationResult(metrics, len(rows), latents, unreadable, picture)


@dataclass(frozen=True)
class _LatentSums:
    """Sums over the images and positions of one batch, float64 on the CPU (MPS has none), (C,) each."""

    mean: Tensor  # of posterior means
    square: Tensor  # of their squares
    variance: Tensor  # of posterior variances
    count: int  # elements of each channel

    @classmethod
    def of(cls, posterior: Posterior) -> Self:
        mean, variance = posterior.mean.cpu().double(), posterior.std.cpu().double().square()  # (B, C, h, w)
        total, square, spread = (value.sum(dim=(0, 2, 3)) for value in (mean, mean.square(), variance))
        return cls(total, square, spread, count=mean.numel() // mean.shape[1])


def _statistics(batches: list[_LatentSums]) -> LatentStatistics:
    count = sum(batch.count for batch in batches)

    def means(name: str) -> Tensor:
        """(C,), the mean over all batches, whatever their order."""
        columns = zip(*(getattr(batch, name).tolist() for batch in batches), strict=True)
        return torch.tensor([math.fsum(column) / count for column in columns], dtype=torch.float64)

    mean, square, variance = means("mean"), means("square"), means("variance")
    second = square + variance  # E[z^2]
    return LatentStatistics(
        mean=mean.mean().item(),
        std=(second.mean() - mean.mean() ** 2).clamp(min=0).sqrt().item(),
        channel_mean=tuple(mean.tolist()),
        channel_std=tuple((second - mean**2).clamp(min=0).sqrt().tolist()),
        active_channels=int((square - mean**2 > ACTIVE_VARIANCE).sum()),
    )


def _displayable(array: np.ndarray, pixels: PixelFormat) -> np.ndarray:
    """uint8 with 1 or 3 channels, for the eye alone: full range to [0, 255], first three bands of many."""
    if array.dtype != np.uint8:
        scaled = (array.astype(np.float64) - pixels.low) / (pixels.high - pixels.low)
        array = np.rint(scaled.clip(0, 1) * 255).astype(np.uint8)
    return array if array.shape[-1] in (1, 3) else array[..., : 3 if array.shape[-1] > 3 else 1]
