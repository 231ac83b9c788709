"""Raw latents (what the posterior gives, what `decode` takes) <-> normalized ones (what diffusion trains on)."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from latentvae.errors import UserError


@dataclass(frozen=True)
class LatentScaling:
    """normalized = (raw - shift) * scale, or with per-channel statistics (raw - mean) * scale / std.

    The two forms are those of diffusers' pipelines: the first of SD 1.x (shift 0), SD3 and FLUX.1, the second of SDXL
    and Qwen-Image. With `patch` p > 1 each p x p square of positions first becomes channels, as FLUX.2's pipeline does:
    channel c at row i and column j of its square is channel (c * p + i) * p + j, and the statistics count those.

    Shapes, letters as everywhere: raw latents (..., D, h, w), normalized ones (..., p * p * D, h / p, w / p).
    """

    scale: float = 1.0
    shift: float = 0.0
    mean: tuple[float, ...] | None = None  # one per normalized channel
    std: tuple[float, ...] | None = None
    patch: int = 1

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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LatentScaling":
        """What `to_dict` gave, exactly. UserError for fields that are unknown, absent or of another kind."""
        names = [field.name for field in fields(cls)]
        if sorted(values) != sorted(names):
            raise UserError(f"latent scaling has the fields {', '.join(sorted(values))}: {', '.join(names)} are needed")
        try:
            mean, std = (None if values[name] is None else tuple(map(float, values[name])) for name in ("mean", "std"))
            scaling = cls(float(values["scale"]), float(values["shift"]), mean, std, int(values["patch"]))
        except (TypeError, ValueError) as error:
            raise UserError(f"latent scaling has a value that is not a number: {error}") from error
        numbers = (scaling.scale, scaling.shift, *(mean or ()), *(std or ()))
        if not all(map(math.isfinite, numbers)) or scaling.scale == 0 or 0 in (std or ()):
            raise UserError("latent scaling must be finite, and neither scale nor std may be 0")
        if (mean is None) != (std is None) or len(mean or ()) != len(std or ()):
            raise UserError("latent scaling needs mean and std for the same channels, or neither")
        if scaling.patch < 1 or scaling.patch != values["patch"]:
            raise UserError(f"latent scaling has patch {values['patch']}: it must be a whole number, 1 or more")
        return scaling

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON takes them; floats keep every bit."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def _per_channel(self, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Offset and factor, as numbers or (p * p * D, 1, 1) tensors in the latents' dtype."""
        if self.mean is None or self.std is None:
            return self.shift, self.scale
        mean = torch.tensor(self.mean, dtype=latents.dtype, device=latents.device)[:, None, None]
        std = torch.tensor(self.std, dtype=latents.dtype, device=latents.device)[:, None, None]
        return mean, self.scale / std

    def normalize(self, raw: Tensor) -> Tensor:
        """raw latents (..., D, h, w) => normalized (..., p * p * D, h / p, w / p), same dtype.

        UserError where h or w is no multiple of p.
        """
        if self.patch > 1:
            if raw.shape[-2] % self.patch or raw.shape[-1] % self.patch:
                raise UserError(
                    f"latents are {raw.shape[-2]} x {raw.shape[-1]}: this model's are normalized in squares of "
                    f"{self.patch} x {self.patch}, so both must be multiples of {self.patch}"
                )
            raw = functional.pixel_unshuffle(raw, self.patch)
        offset, factor = self._per_channel(raw)
        if isinstance(offset, float) and offset == 0:
            return raw * factor  # readers of stores are bound by memory: one pass less
        return (raw - offset).mul_(factor)

    def denormalize(self, normalized: Tensor) -> Tensor:
        """normalized latents (..., p * p * D, h / p, w / p) => raw (..., D, h, w), same dtype."""
        offset, factor = self._per_channel(normalized)
        raw = normalized / factor + offset
        return functional.pixel_shuffle(raw, self.patch) if self.patch > 1 else raw
