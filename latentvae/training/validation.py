"""Images that are measured and pictured while training runs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from latentvae.data.pipeline import Batch
from latentvae.evaluation.metrics import psnr
from latentvae.images import PixelFormat, from_model, image_grid, to_model
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.model.posterior import Posterior


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of sampled raw latents: Var(z) = Var(mean) + E[posterior variance].

    Attributes:
        mean, std: over all elements.
        channel_mean, channel_std: C values each.
        num_images: images they were measured on.
    """

    mean: float
    std: float
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]
    num_images: int

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
        metrics: psnr (dB, mean over images) and lpips (where the run has a perceptual term).
        latents: statistics of the raw latents.
        picture: HWC uint8, originals above reconstructions; None on processes but the first, or if not asked for.
    """

    metrics: dict[str, float]
    latents: LatentStatistics
    picture: np.ndarray | None


def validate(
    vae: AutoencoderKL,
    batches: Iterator[Batch],
    pixels: PixelFormat,
    *,
    device: torch.device,
    perceptual: nn.Module | None = None,
    num_pictures: int = 0,
    on_unreadable: Callable[[list[tuple[str, str]]], None] | None = None,
) -> ValidationResult:
    """Reconstruct every image through the posterior mode, without autocast, and measure.

    Integer pixels are clamped and rounded before PSNR (EVALUATION protocol). Each process passes its own share of the
    images; the figures are over all of them, each image once.
    """
    rows: list[dict[str, Any]] = []
    sums: list[tuple[Tensor, Tensor, int]] = []
    pictures: list[np.ndarray] = []
    parameter = next(vae.parameters())
    with torch.no_grad():
        for batch in batches:
            if on_unreadable is not None:
                on_unreadable(batch.unreadable)
            if not batch.keys:
                continue
            original = batch.images.to(device)
            images = to_model(original, pixels).to(parameter.dtype)
            posterior = Posterior(vae.moments(images))
            reconstructions = vae.decode(posterior.mode()).sample
            restored = from_model(reconstructions, pixels)
            figures = {"psnr": psnr(original, restored, data_range=pixels.high - pixels.low).tolist()}
            if perceptual is not None:
                figures["lpips"] = perceptual(images, reconstructions.clamp(-1, 1)).tolist()
            rows += [dict(zip(figures, values, strict=True)) for values in zip(*figures.values(), strict=True)]
            mean, variance = posterior.mean.double(), posterior.std.double().square()
            squares = mean.square() + variance
            sums.append((mean.sum((0, 2, 3)).cpu(), squares.sum((0, 2, 3)).cpu(), mean[:, 0].numel()))
            room = max(0, num_pictures - len(pictures) // 2)
            for pair in zip(original[:room].cpu().numpy(), restored[:room].cpu().numpy(), strict=True):
                pictures += pair
    rows, sums = gather_object(rows), gather_object(sums)
    if not rows:
        raise RuntimeError("no validation image could be read")
    metrics = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    picture = None
    if pictures:
        shown = [_displayable(array, pixels) for array in pictures[0::2] + pictures[1::2]]
        picture = image_grid(shown, columns=len(pictures) // 2)
    return ValidationResult(metrics, _statistics(sums, len(rows)), picture)


def _statistics(sums: list[tuple[Tensor, Tensor, int]], num_images: int) -> LatentStatistics:
    total = sum(count for _, _, count in sums)
    first = torch.stack([value for value, _, _ in sums]).sum(0) / total  # (C,) E[z]
    second = torch.stack([value for _, value, _ in sums]).sum(0) / total  # (C,) E[z^2]
    mean = first.mean()
    return LatentStatistics(
        mean=mean.item(),
        std=(second.mean() - mean.square()).clamp(min=0).sqrt().item(),
        channel_mean=tuple(first.tolist()),
        channel_std=tuple((second - first.square()).clamp(min=0).sqrt().tolist()),
        num_images=num_images,
    )


def _displayable(array: np.ndarray, pixels: PixelFormat) -> np.ndarray:
    """uint8 with 1 or 3 channels, for the eye alone: full range to [0, 255], first three bands of many."""
    if array.dtype != np.uint8:
        scaled = (array.astype(np.float64) - pixels.low) / (pixels.high - pixels.low)
        array = np.rint(scaled.clip(0, 1) * 255).astype(np.uint8)
    return array if array.shape[-1] in (1, 3) else array[..., : 3 if array.shape[-1] > 3 else 1]
