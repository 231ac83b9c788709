"""How far fine-tuning moved a model from the one it started from, and whether the two still understand each other."""

import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from latentvae.checkpoint import model_hashes
from latentvae.data.pipeline import Batch
from latentvae.errors import UserError
from latentvae.evaluation.metrics import psnr
from latentvae.images import PixelFormat, from_model, to_model
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.model.posterior import Posterior
from latentvae.model.scaling import LatentScaling
from latentvae.training.lora import plain_model
from latentvae.training.starting import StartingModel
from latentvae.training.validation import MAX_PSNR


@dataclass(frozen=True)
class DriftReport:
    """Latents are posterior means; "old" is the starting model, "new" the fine-tuned one. PSNR in dB, mean over images.

    Attributes:
        num_images: how many images the figures are over.
        latent_mse: mean squared difference of raw latents, mean over images.
        latent_mse_normalized: the same of normalized latents, whose variance is about 1 where the scaling is measured.
        cosine: similarity of an image's old and new raw latents as vectors, mean over images.
        max_difference: largest absolute difference of a raw latent element.
        has_equal_latents: means and log variances of all these images are the same, bit for bit.
        has_equal_encoder: encoder and quant_conv hash the same, so that latents of any image are.
        has_equal_scaling: scaling_factor, shift_factor, latents_mean and latents_std are the same.
        psnr_old: old decoder on old latents.
        psnr_new: new decoder on new latents.
        psnr_old_decoder: old decoder on new latents: what a user of the old model sees of new latents.
        psnr_new_decoder: new decoder on old latents: what the new model makes of stored latents.
    """

    num_images: int
    latent_mse: float
    latent_mse_normalized: float
    cosine: float
    max_difference: float
    has_equal_latents: bool
    has_equal_encoder: bool
    has_equal_scaling: bool
    psnr_old: float
    psnr_new: float
    psnr_old_decoder: float
    psnr_new_decoder: float

    @property
    def is_bit_identical(self) -> bool:
        """Existing latents stay valid: by the values of these images and by the weights that make them."""
        return self.has_equal_latents and self.has_equal_encoder

    def to_dict(self) -> dict[str, Any]:
        """All figures, as JSON takes them."""
        return asdict(self) | {"is_bit_identical": self.is_bit_identical}

    def __str__(self) -> str:
        if self.is_bit_identical:
            latents = "bit-identical, by their values and by the encoder's weights"
        elif self.has_equal_latents:
            latents = "bit-identical on these images, but the encoder's weights differ"
        else:
            latents = (
                f"mean squared difference {self.latent_mse:.3g} raw, {self.latent_mse_normalized:.3g} normalized; "
                f"cosine {self.cosine:.6f}; largest difference {self.max_difference:.3g}"
            )
            if self.has_equal_encoder:
                latents += " (the encoder's weights are the same: rounding alone)"
        return "\n".join(
            [
                f"drift from the starting model over {self.num_images} images",
                f"  latents   {latents}",
                f"  scaling   {'unchanged' if self.has_equal_scaling else 'changed'}",
                f"  PSNR      {self.psnr_old:.2f} dB before, {self.psnr_new:.2f} dB now",
                f"  crossed   {self.psnr_new_decoder:.2f} dB with old latents in the new decoder, "
                f"{self.psnr_old_decoder:.2f} dB with new latents in the old decoder",
            ]
        )


def measure_drift(
    starting: StartingModel,
    vae: AutoencoderKL,
    batches: Iterator[Batch],
    pixels: PixelFormat,
    device: torch.device,
) -> DriftReport:
    """Compare `vae` with what it started from on every image, through posterior means, without autocast.

    Each process passes its own share of the images; the figures are over all of them, each image once, and equal on
    all processes. An adapter in `vae` is merged; where an average is to be measured, call it with the average applied.

    Args:
        device: that of `vae`; the starting model is brought there for the time.

    Raises:
        UserError: none of the images is readable.
    """
    # What else than values decides rounding is made alike: torch multiplies in another order where weights require a
    # gradient (even under no_grad), and libraries may where weights lie at odd addresses, as those read from files do.
    new = copy.deepcopy(plain_model(vae)).requires_grad_(False)
    scaling = LatentScaling.from_config(new.config)
    rows: list[dict[str, float]] = []
    unreadable: list[tuple[str, str]] = []
    old_hashes, new_hashes = starting.hashes, model_hashes(new)
    with starting.like(new) as old, torch.no_grad():
        has_equal_scaling = LatentScaling.from_config(old.config) == scaling
        for batch in batches:
            unreadable += batch.unreadable
            if batch.keys:
                rows += _rows(old, new, batch, pixels, scaling, device)
    rows, unreadable = gather_object(rows), gather_object(unreadable)
    if not rows:
        raise UserError(f"none of the {len(unreadable)} validation images is readable: {unreadable[:3]}")
    # fsum rounds once, so that neither the order of the images nor the number of processes counts.
    means = {name: math.fsum(row[name] for row in rows) / len(rows) for name in rows[0]}
    return DriftReport(
        num_images=len(rows),
        latent_mse=means["mse"],
        latent_mse_normalized=means["mse_normalized"],
        cosine=means["cosine"],
        max_difference=max(row["max"] for row in rows),
        has_equal_latents=all(row["equal"] for row in rows),
        has_equal_encoder=old_hashes.encoder == new_hashes.encoder,
        has_equal_scaling=has_equal_scaling,
        psnr_old=means["psnr_old"],
        psnr_new=means["psnr_new"],
        psnr_old_decoder=means["psnr_old_decoder"],
        psnr_new_decoder=means["psnr_new_decoder"],
    )


def _rows(
    old: AutoencoderKL,
    new: AutoencoderKL,
    batch: Batch,
    pixels: PixelFormat,
    scaling: LatentScaling,
    device: torch.device,
) -> list[dict[str, float]]:
    """The figures of each image of one batch."""
    images = to_model(batch.images.to(device), pixels).to(next(new.parameters()).dtype)
    before, after = old.moments(images), new.moments(images)  # (B, 2c, h, w)
    old_mean, new_mean = Posterior(before).mean, Posterior(after).mean  # (B, c, h, w)

    def decibel(decoder: AutoencoderKL, latents: Tensor) -> list[float]:
        restored = from_model(decoder.decode(latents).sample, pixels).cpu()
        figures: list[float] = psnr(batch.images, restored, data_range=pixels.high - pixels.low).tolist()
        return [min(figure, MAX_PSNR) for figure in figures]

    equal = [float(torch.equal(a, b)) for a, b in zip(before, after, strict=True)]
    wide_old, wide_new = old_mean.cpu().double(), new_mean.cpu().double()  # not on the device: MPS has no float64
    difference = wide_new - wide_old
    normalized = scaling.normalize(wide_new) - scaling.normalize(wide_old)
    columns = {
        "mse": difference.square().flatten(1).mean(1).tolist(),
        "mse_normalized": normalized.square().flatten(1).mean(1).tolist(),
        "cosine": torch.nn.functional.cosine_similarity(wide_old.flatten(1), wide_new.flatten(1)).clamp(-1, 1).tolist(),
        "max": difference.abs().flatten(1).amax(1).tolist(),
        "equal": equal,
        "psnr_old": decibel(old, old_mean),
        "psnr_new": decibel(new, new_mean),
        "psnr_old_decoder": decibel(old, new_mean),
        "psnr_new_decoder": decibel(new, old_mean),
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
