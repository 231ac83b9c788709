"""What a pixel is: the declared format, the policy for reading files, and the way to [-1, 1] and back.

Letters: B images, C channels, H height, W width, all in pixels.
"""

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor
from torch.nn import functional

from latentvae.errors import UserError

PixelDtype = Literal["uint8", "uint16", "float32"]
Byte = Annotated[int, Field(ge=0, le=255)]

_FULL_RANGE: dict[str, tuple[float, float]] = {"uint8": (0.0, 255.0), "uint16": (0.0, 65535.0)}
_TORCH_DTYPE = {"uint8": torch.uint8, "uint16": torch.uint16, "float32": torch.float32}

# Pillow's own limit: above it Pillow warns, above twice that it refuses.
PILLOW_PIXEL_LIMIT = 89_478_485


class ImageError(UserError):
    """This one image cannot be used, and why: one line without the file's name, which the caller adds."""


class PixelFormat(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """What the arrays outside the model hold; the default is 8-bit RGB."""

    channels: int = Field(default=3, ge=1, le=1024, description="channels per pixel, the model's in_channels")
    dtype: PixelDtype = Field(default="uint8", description="sample type: uint8, uint16 or float32")
    range: tuple[float, float] | None = Field(
        default=None,
        description="(lowest, highest) sample value, mapped to [-1, 1]; null: dtype's full range (float32 must say)",
    )

    @model_validator(mode="after")
    def _check_range(self) -> "PixelFormat":
        if self.range is None and self.dtype == "float32":
            raise ValueError("float32 pixels have no natural range: give range, such as [0, 1]")
        low, high = self.low, self.high
        if not (np.isfinite(low) and np.isfinite(high) and low < high):
            raise ValueError(f"range is [{low}, {high}]: two finite numbers are needed, the lower one first")
        if self.dtype != "float32" and (low < 0 or high > _FULL_RANGE[self.dtype][1]):
            raise ValueError(f"range [{low}, {high}] goes beyond what {self.dtype} can hold")
        return self

    @property
    def low(self) -> float:
        """The sample value that becomes -1."""
        return self.range[0] if self.range is not None else _FULL_RANGE[self.dtype][0]

    @property
    def high(self) -> float:
        """The sample value that becomes 1."""
        return self.range[1] if self.range is not None else _FULL_RANGE[self.dtype][1]

    @property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype(self.dtype)

    @property
    def torch_dtype(self) -> torch.dtype:
        return _TORCH_DTYPE[self.dtype]

    @property
    def is_full_range(self) -> bool:
        """Whether every value of the dtype is allowed, so that nothing needs to be checked."""
        return self.dtype != "float32" and (self.low, self.high) == _FULL_RANGE[self.dtype]


class DecodePolicy(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """How image files become arrays. Two stores made under different policies hold different pictures."""

    background: tuple[Byte, Byte, Byte] = Field(
        default=(255, 255, 255), description="sRGB colour put behind transparent pixels, 0 to 255 (RGB pictures only)"
    )
    animation: Literal["first", "refuse"] = Field(
        default="first", description="files with several frames or pages: read the first one, or refuse the file"
    )
    max_pixels: int = Field(
        default=PILLOW_PIXEL_LIMIT,
        ge=1,
        le=2 * PILLOW_PIXEL_LIMIT,
        description="largest width x height, read from the header first",
    )
    icc: Literal["srgb", "ignore"] = Field(
        default="srgb",
        description="colour profile of RGB pictures: convert to sRGB (a broken profile is ignored), or ignore",
    )

    def check_size(self, width: int, height: int) -> None:
        """Raise an ImageError for a picture that is empty or has more than max_pixels."""
        if width < 1 or height < 1:
            raise ImageError(f"is {width}x{height} pixels")
        if width * height > self.max_pixels:
            raise ImageError(
                f"is {width}x{height} = {width * height:,} pixels; at most {self.max_pixels:,} are allowed (max_pixels)"
            )


def conform(samples: np.ndarray, pixels: PixelFormat) -> np.ndarray:
    """Samples as they were stored => the declared format, or ImageError. No value is lost.

    `samples` (H, W, C) or (H, W), unsigned 8/16 bit or floating point. Allowed: the same dtype; uint8 widened to
    full-range uint16 (times 257); anything to float32 when its values lie in the declared range. 16 bits are never
    narrowed to 8.
    """
    if samples.ndim == 2:
        samples = samples[:, :, None]
    if samples.ndim != 3 or 0 in samples.shape:
        raise ImageError(f"has shape {samples.shape}: a non-empty (height, width, channels) array is needed")
    if samples.shape[2] != pixels.channels:
        raise ImageError(f"has {samples.shape[2]} channels; {pixels.channels} are declared")
    if samples.dtype == pixels.numpy_dtype:
        array = samples
    elif samples.dtype == np.uint8 and pixels.dtype == "uint16" and pixels.is_full_range:
        array = samples.astype(np.uint16) * np.uint16(257)
    elif samples.dtype.kind in "uif" and pixels.dtype == "float32":
        array = samples.astype(np.float32)
    else:
        raise ImageError(
            f"has {samples.dtype} samples; {pixels.dtype} in [{pixels.low:g}, {pixels.high:g}] is declared"
        )
    if not pixels.is_full_range:
        low, high = float(array.min()), float(array.max())
        if not (pixels.low <= low and high <= pixels.high):  # also true of NaN
            raise ImageError(f"has samples from {low:g} to {high:g}; [{pixels.low:g}, {pixels.high:g}] is declared")
    return np.ascontiguousarray(array)


def to_model(images: Tensor, pixels: PixelFormat) -> Tensor:
    """Images [low, high] => float32 [-1, 1], on the device where they lie.

    images: (B, H, W, C) or (H, W, C) of pixels.dtype        -> (B, C, H, W), contiguous
    """
    if images.dim() == 3:
        images = images[None]
    if images.dim() != 4 or images.shape[-1] != pixels.channels or images.dtype != pixels.torch_dtype:
        raise UserError(
            f"images are {tuple(images.shape)} {images.dtype}; "
            f"(B, H, W, {pixels.channels}) {pixels.torch_dtype} is declared"
        )
    if images.dtype == torch.uint16:
        # few kernels know uint16 on every device: the same bits as int16, then the sign bit undone
        samples = (images.view(torch.int16).to(torch.int32) & 0xFFFF).float()
    else:
        samples = images.to(torch.float32, copy=True)  # changed in place below: never the caller's own
    samples = samples.permute(0, 3, 1, 2).contiguous()
    return samples.sub_(pixels.low).mul_(2.0 / (pixels.high - pixels.low)).sub_(1.0)


def from_model(images: Tensor, pixels: PixelFormat) -> Tensor:
    """Images [-1, 1] => [low, high] of pixels.dtype, clamped, and rounded where the dtype is an integer.

    images: (B, C, H, W) of any floating dtype               -> (B, H, W, C), contiguous
    """
    if images.dim() != 4 or images.shape[1] != pixels.channels or not images.is_floating_point():
        raise UserError(
            f"images are {tuple(images.shape)} {images.dtype}; floating (B, {pixels.channels}, H, W) is needed"
        )
    samples = images.detach().float().clamp(-1.0, 1.0).permute(0, 2, 3, 1).contiguous()
    samples = ((samples + 1.0) * ((pixels.high - pixels.low) / 2.0) + pixels.low).clamp(pixels.low, pixels.high)
    if pixels.dtype == "float32":
        return samples
    samples = samples.round()
    return samples.to(torch.int32).to(torch.uint16) if pixels.dtype == "uint16" else samples.to(torch.uint8)


def pad_to_multiple(images: Tensor, multiple: int) -> tuple[Tensor, tuple[int, int]]:
    """Repeat the last row and column until both sides divide by `multiple`; also return the size before.

    images: (B, C, H, W)                                     -> (B, C, H', W'), (H, W)
    """
    height, width = images.shape[-2:]
    below, right = -height % multiple, -width % multiple
    padded = functional.pad(images, (0, right, 0, below), mode="replicate") if below or right else images
    return padded, (height, width)


def crop_back(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Undo `pad_to_multiple`: keep the top left `size` = (H, W) of (B, C, H', W')."""
    return images[..., : size[0], : size[1]]
