"""Resize and crop HWC arrays of any declared dtype, with no detour through RGB or 8 bits."""

import bisect
import itertools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from PIL import Image

from latentvae.errors import UserError
from latentvae.images.pixels import PILLOW_PIXEL_LIMIT, ImageError

ResizeFilter = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
Box = tuple[float, float, float, float]

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def resize(
    array: np.ndarray, size: tuple[int, int], filter: ResizeFilter = "bicubic", box: Box | None = None
) -> np.ndarray:
    """Resample to `size` = (width, height), antialiased when shrinking (Pillow's convolution resampling).

    array: (H, W, C) uint8, uint16 or float32                -> (height, width, C), same dtype
    `box` = (left, top, right, bottom) in source pixels: the part to resample; the filter sees around it, so the
    result is the crop of the resized whole. Integers are rounded and clipped to their dtype; floats are clipped to the
    values that the image had, because a bicubic overshoot would leave the declared range.
    """
    width, height = size
    if array.ndim != 3 or array.dtype not in (np.uint8, np.uint16, np.float32):
        raise UserError(f"resize takes (H, W, C) uint8, uint16 or float32, not {array.shape} {array.dtype}")
    if width < 1 or height < 1:
        raise UserError(f"resize to {width}x{height}: both sides must be at least 1 pixel")
    if width * height > PILLOW_PIXEL_LIMIT:  # a strip of one pixel by thousands, enlarged to a shorter side of 256
        raise ImageError(f"would become {width}x{height} pixels: at most {PILLOW_PIXEL_LIMIT:,} are allowed")
    if box is None and (width, height) == (array.shape[1], array.shape[0]):
        return np.ascontiguousarray(array)
    if array.dtype == np.uint8 and array.shape[2] == 3:
        return np.array(Image.fromarray(np.ascontiguousarray(array)).resize(size, _FILTERS[filter], box=box))
    # One channel at a time: Pillow would take 4 channels for RGBA and weigh the first three by the fourth.
    # 8 bits stay 8 bits; 16 bits and floats go through float32, which holds every 16-bit integer.
    work = array if array.dtype == np.uint8 else array.astype(np.float32)
    planes = [
        np.asarray(Image.fromarray(np.ascontiguousarray(work[:, :, channel])).resize(size, _FILTERS[filter], box=box))
        for channel in range(array.shape[2])
    ]
    result = np.stack(planes, axis=-1)
    if array.dtype == np.uint16:
        return np.clip(np.rint(result), 0, 65535).astype(np.uint16)
    return np.clip(result, array.min(), array.max()) if array.dtype == np.float32 else result


def shorter_side_size(width: int, height: int, size: int) -> tuple[int, int]:
    """(width, height) after scaling so that the shorter side is `size` pixels, the longer one rounded."""
    if width <= height:
        return size, max(size, round(height * size / width))
    return max(size, round(width * size / height)), size


def covering_size(width: int, height: int, size: tuple[int, int], scale: float = 1.0) -> tuple[int, int]:
    """(width, height) after scaling an image so that it just covers `size` = (width, height) pixels, times `scale`.

    `scale` is at least 1. The side that decides is rounded first, the other one follows it; neither is below `size`.
    """
    wide, high = size
    if width * high <= height * wide:
        covering = round(wide * scale)
        return covering, max(high, round(height * covering / width))
    covering = round(high * scale)
    return max(wide, round(width * covering / height)), covering


def sizes_of_area(area: int, step: int, max_ratio: float) -> tuple[tuple[int, int], ...]:
    """Sizes (width, height) of about `area` pixels in whole steps, by rising width / height.

    For each width the largest height that keeps within the area, and the same the other way round, as far as the ratio
    of the sides, either way, is at most `max_ratio`.
    """
    sizes = set()
    for long in range(step, int(math.sqrt(area * max_ratio)) + 1, step):
        short = area // long // step * step
        if short and max(long / short, short / long) <= max_ratio:
            sizes |= {(long, short), (short, long)}
    return tuple(sorted(sizes, key=lambda size: (size[0] / size[1], size)))


class AspectRatios:
    """The nearest of some sizes by aspect ratio, in its logarithm.

    Divisions and square roots are rounded alike on every machine, so that no two disagree about an image.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        """`sizes`: (width, height), by rising width / height."""
        ratios = [width / height for width, height in sizes]
        self._limits = [math.sqrt(one * other) for one, other in itertools.pairwise(ratios)]

    def nearest(self, width: int, height: int) -> int:
        """Index of the size nearest to width x height."""
        return bisect.bisect_left(self._limits, width / height)

    def nearest_of(self, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        """`nearest` for many: (N,) and (N,) => (N,) int64."""
        return np.searchsorted(np.array(self._limits), widths / heights, side="left").astype(np.int64)


def resize_shorter_side(array: np.ndarray, size: int, filter: ResizeFilter = "bicubic") -> np.ndarray:
    """Scale (H, W, C), up or down, so that its shorter side is `size` pixels."""
    return resize(array, shorter_side_size(array.shape[1], array.shape[0], size), filter)


def center_crop(array: np.ndarray, size: int) -> np.ndarray:
    """The middle `size` x `size` pixels of (H, W, C); an odd remainder leaves one pixel more below and right."""
    height, width = array.shape[:2]
    return crop(array, (height - size) // 2, (width - size) // 2, size, size)


def crop(array: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    """The rectangle of (H, W, C) that starts at row `top` and column `left`; one beyond the edges is refused."""
    if top < 0 or left < 0 or top + height > array.shape[0] or left + width > array.shape[1]:
        raise UserError(
            f"crop {width}x{height} at ({left}, {top}) leaves the {array.shape[1]}x{array.shape[0]} image: resize it"
        )
    return np.ascontiguousarray(array[top : top + height, left : left + width])
