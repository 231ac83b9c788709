"""What every export does: its own copy of the model, values that the precision holds, and a proof by comparison."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from latentvae.checkpoint import check_no_adapter, load_model
from latentvae.errors import UserError
from latentvae.images import PixelFormat, to_model
from latentvae.model.autoencoder import CONFIG_FIELDS, AutoencoderKL

ExportDtype = Literal["fp32", "fp16", "bf16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Both networks compute in float32 from the same numbers; only the order of sums may differ.
TOLERANCE = 1e-4


class ExportError(RuntimeError):
    """What was written, loaded back by plain diffusers, is not the model: a fault of ours, not of the user."""


def known_dtype(dtype: str) -> torch.dtype:
    """UserError if there is no such precision."""
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is not known: use {', '.join(DTYPES)}")
    return DTYPES[dtype]


def private_copy(model: str | Path | AutoencoderKL) -> AutoencoderKL:
    """The model to export, in float32 on the CPU and eval mode; what was given stays as it is.

    Built anew: tiling, hooks and casts of the given one, and where it was loaded from, are not part of the model.
    """
    given = load_model(model) if isinstance(model, str | Path) else model
    check_no_adapter(given)
    with torch.device("meta"):
        vae = AutoencoderKL(**{name: given.config[name] for name in CONFIG_FIELDS})
    weights = {name: tensor.to("cpu", torch.float32, copy=True) for name, tensor in given.state_dict().items()}
    vae.load_state_dict(weights, assign=True)
    return vae.eval()


def check_values(weights: Mapping[str, Tensor], dtype: str) -> None:
    """Raise a UserError naming the first weight that `dtype` cannot hold."""
    largest = torch.finfo(DTYPES[dtype]).max
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"the model's {name} has values that are not finite: export a checkpoint from before")
        extreme = tensor.abs().max().item()
        if extreme > largest:
            raise UserError(f"{name} reaches {extreme:g} and {dtype} ends at {largest:g}: export bf16 or fp32")


def check_images(vae: AutoencoderKL, images: np.ndarray | None, pixels: PixelFormat | None) -> Tensor:
    """Images for the check, [-1, 1] (B, C, H, W), sides multiples of f."""
    channels, factor = vae.config.in_channels, vae.downsample_factor
    if images is None:
        side = factor * max(4, 32 // factor)  # enough positions for attention and every border to matter
        return torch.rand(1, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pixel_format = pixels or PixelFormat(channels=channels, dtype="uint8", range=None)
    batch = to_model(torch.from_numpy(np.ascontiguousarray(images)), pixel_format)
    height, width = (side - side % factor for side in batch.shape[-2:])
    if not height or not width:
        raise UserError(f"images are {batch.shape[-1]}x{batch.shape[-2]}: at least {factor}x{factor} is needed")
    return batch[..., :height, :width]


def described(sample: Tensor, *, is_given: bool) -> str:
    """The check images in words."""
    return f"{len(sample)} {'given' if is_given else 'noise'} image(s) of {sample.shape[-1]}x{sample.shape[-2]}"


@dataclass(frozen=True)
class Outputs:
    """What an autoencoder makes of the check images."""

    moments: Tensor  # (B, 2D, h, w)
    reconstructions: Tensor  # (B, C, H, W)


@torch.no_grad()
def outputs_of(vae: Any, sample: Tensor) -> Outputs:
    """What any AutoencoderKL, ours or plain, makes of the sample, in float32 on the CPU."""
    posterior = vae.encode(sample).latent_dist
    return Outputs(posterior.parameters, vae.decode(posterior.mode()).sample)


def difference(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, 0 where both are 0."""
    distance = torch.linalg.vector_norm((a - b).double()).item()
    return distance / torch.linalg.vector_norm(b.double()).item() if distance else 0.0
