"""Raw latents (what the posterior gives, what `decode` takes) <-> normalized ones (what diffusion trains on)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentvae.errors import UserError


@dataclass(frozen=True)
class LatentScaling:
    """normalized = (raw - shift) * scale, or with per-channel statistics (raw - mean) * scale / std.

    The two forms are those of diffusers' pipelines: the first of SD 1.x (shift 0), SD3 and FLUX, the second of SDXL.
    """

    scale: float = 1.0
    shift: float = 0.0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "LatentScaling":
        """From config.json fields. UserError where they contradict each other."""
        mean, std = config.get("latents_mean"), config.get("latents_std")
        shift = config.get("shift_factor") or 0.0
        if (mean is None) != (std is None):
            given, absent = ("latents_mean", "latents_std") if std is None else ("latents_std", "latents_mean")
            raise UserError(f"the model's config.json has {given} but no {absent}: give both or neither")
        if mean is not None and shift:
            raise UserError(
                f"the model's config.json has both shift_factor {shift} and latents_mean, and pipelines apply one or "
                "the other: set shift_factor or latents_mean and latents_std to null"
            )
        scale = float(config["scaling_factor"])
        if not all(map(math.isfinite, (scale, shift, *(mean or ()), *(std or ())))):
            raise UserError("the model's config.json has latent scaling that is not finite (nan or infinity)")
        if scale == 0:
            raise UserError("the model's config.json has scaling_factor 0, which would erase every latent")
        if mean is None or std is None:
            return cls(scale=scale, shift=float(shift))
        channels = config["latent_channels"]
        if len(mean) != channels or len(std) != channels:
            raise UserError(
                f"latents_mean and latents_std have {len(mean)} and {len(std)} values, latent_channels is {channels}"
            )
        if 0 in std:
            raise UserError("the model's config.json has a 0 in latents_std, and latents are divided by it")
        return cls(scale=scale, mean=tuple(map(float, mean)), std=tuple(map(float, std)))

    def _per_channel(self, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Offset and factor, as numbers or (D, 1, 1) tensors in the latents' dtype."""
        if self.mean is None or self.std is None:
            return self.shift, self.scale
        mean = torch.tensor(self.mean, dtype=latents.dtype, device=latents.device)[:, None, None]
        std = torch.tensor(self.std, dtype=latents.dtype, device=latents.device)[:, None, None]
        return mean, self.scale / std

    def normalize(self, raw: Tensor) -> Tensor:
        """raw latents (..., D, h, w) => normalized, same shape and dtype."""
        offset, factor = self._per_channel(raw)
        return (raw - offset) * factor

    def denormalize(self, normalized: Tensor) -> Tensor:
        """normalized latents (..., D, h, w) => raw, same shape and dtype."""
        offset, factor = self._per_channel(normalized)
        return normalized / factor + offset
