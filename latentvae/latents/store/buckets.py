"""Sizes of images in a store: one square, or aspect-ratio buckets of about equal area, and where an image goes."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from latentvae.errors import UserError
from latentvae.images import AspectRatios, sizes_of_area
from latentvae.latents.store.records import Bucket

SmallPolicy = Literal["skip", "keep", "upscale"]

# Podell et al. 2023, SDXL, appendix I: heights of 512 to 2048 in steps of 64, about 1024^2 pixels; (height, width).
_SDXL = (
    "512x2048 512x1984 512x1920 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472 704x1408 704x1344 "
    "768x1344 768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024 1024x1024 1024x960 1088x960 1088x896 "
    "1152x896 1152x832 1216x832 1280x768 1344x768 1408x704 1472x704 1536x640 1600x640 1664x576 1728x576 1792x576 "
    "1856x512 1920x512 1984x512 2048x512"
)
_SDXL_STEP = 64


@dataclass(frozen=True)
class Placement:
    """Where an image lies in its bucket: scaled so that it covers the bucket, then the centre cut out. Pixels."""

    bucket: Bucket
    scaled_width: int
    scaled_height: int
    crop_top: int
    crop_left: int


@dataclass(frozen=True)
class BucketRule:
    """Which bucket an image of a given size goes into."""

    spec: str  # as the fingerprint names it
    sizes: tuple[tuple[int, int], ...]  # (width, height), by rising aspect ratio
    step: int  # sides of buckets are multiples of it
    downsample_factor: int
    small: SmallPolicy

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """All of the rule; `small: keep` makes smaller ones besides."""
        return tuple(self.bucket(width, height) for width, height in self.sizes)

    def bucket(self, width: int, height: int) -> Bucket:
        """Of that size in pixels."""
        factor = self.downsample_factor
        return Bucket(width=width, height=height, latent_width=width // factor, latent_height=height // factor)

    @cached_property
    def _ratios(self) -> AspectRatios:
        return AspectRatios(self.sizes)

    def nearest(self, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        """Index into `buckets` of the nearest aspect ratio (in its logarithm), for many images: (N,) int64."""
        return self._ratios.nearest_of(widths, heights)

    def place(self, width: int, height: int) -> Placement | str:
        """Where an image of width x height goes, or the reason why it is left out."""
        wide, high = self.sizes[self._ratios.nearest(width, height)]
        if wide > width or high > height:
            if self.small == "skip":
                return (
                    f"{width}x{height} is smaller than {wide}x{high}: "
                    "lower --resolution, or --small keep, or --small upscale"
                )
            if self.small == "keep":
                wide, high = self._fitting(width, height, wide, high)
                if not wide or not high:
                    return f"{width}x{height} is too small: it holds no {self.step}x{self.step} square"
        scale = max(wide / width, high / height)
        scaled_width, scaled_height = max(wide, round(width * scale)), max(high, round(height * scale))
        return Placement(
            self.bucket(wide, high),
            scaled_width,
            scaled_height,
            (scaled_height - high) // 2,
            (scaled_width - wide) // 2,
        )

    def _fitting(self, width: int, height: int, wide: int, high: int) -> tuple[int, int]:
        """The largest size of about the bucket's shape, in whole steps, that the image covers without enlarging."""
        is_narrow = width * high <= height * wide
        fitting = (width, high * width // wide) if is_narrow else (wide * height // high, height)
        return fitting[0] // self.step * self.step, fitting[1] // self.step * self.step


def square_rule(side: int, downsample_factor: int, size_multiple: int, small: SmallPolicy) -> BucketRule:
    """One bucket: the shorter side is resized to `side` pixels and the centre square cut out."""
    if side < 1 or side % size_multiple:
        below = side // size_multiple * size_multiple
        near = " and ".join(str(size) for size in (below, below + size_multiple) if size > 0)
        raise UserError(f"--resolution is {side}; this model takes multiples of {size_multiple}: {near} would do")
    return BucketRule(f"{side}x{side}", ((side, side),), size_multiple, downsample_factor, small)


def bucket_rule(text: str, downsample_factor: int, size_multiple: int, small: SmallPolicy) -> BucketRule:
    """From `sdxl` or `area=1048576,step=64,max-ratio=4` (pixels; step and max-ratio may be left out).

    Buckets of an area: for each width in whole steps the largest height in whole steps that keeps within the area, and
    the same the other way round, as far as the ratio of the sides allows.
    """
    if text == "sdxl":
        sizes = {(int(width), int(height)) for height, width in (size.split("x") for size in _SDXL.split())}
        step, spec = _SDXL_STEP, text
    else:
        area, step, max_ratio = _parsed(text)
        sizes = set(sizes_of_area(area, step, max_ratio))
        spec = f"area={area},step={step},max-ratio={repr(max_ratio).removesuffix('.0')}"
    if step % size_multiple:
        raise UserError(f"--buckets has a step of {step} pixels; this model takes multiples of {size_multiple}")
    ordered = tuple(sorted(sizes, key=lambda size: (size[0] / size[1], size)))
    return BucketRule(spec, ordered, step, downsample_factor, small)


def _parsed(text: str) -> tuple[int, int, float]:
    example = "sdxl, or such as area=1048576,step=64,max-ratio=4"
    values = {"step": "64", "max-ratio": "4"}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name.strip() not in ("area", "step", "max-ratio"):
            raise UserError(f"--buckets {text!r}: {name.strip()!r} is not known; write {example}")
        values[name.strip()] = value.strip()
    try:
        area, step, max_ratio = int(values["area"]), int(values["step"]), float(values["max-ratio"])
    except (KeyError, ValueError) as error:
        raise UserError(
            f"--buckets {text!r}: area and step are whole numbers, max-ratio a number; write {example}"
        ) from error
    if step < 1 or area < step * step or not 1 <= max_ratio <= 100:
        raise UserError(f"--buckets {text!r}: the area must hold a square of one step, and max-ratio be 1 to 100")
    return area, step, max_ratio
