"""Aspect-ratio buckets: the sizes that training images are cut to, and which image goes into which.

Buckets have about equal areas, as those of NovelAI and SDXL (Podell et al. 2023, appendix I): a step costs about the
same in each, and an image is cropped little.
"""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache

import numpy as np
from pydantic import BaseModel, Field
from torch.utils.data import Dataset

from latentvae.data.entries import ImageSource, SourceEntry
from latentvae.data.workers import load_batches
from latentvae.images import AspectRatios, DecodePolicy, ImageError, probe_size, sizes_of_area
from latentvae.progress import ImageProgress

Size = tuple[int, int]  # (width, height) in pixels

_THREADS = 16  # the read of a header waits for the disk, mostly
_BLOCK = 1_024  # entries that a worker takes at a time
_HELD = 32  # images of an archive held at a time


class AspectBuckets(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Sizes of about resolution^2 pixels; each optimizer step is of one of them."""

    max_aspect: float = Field(
        2.0, ge=1, le=16, description="longer over shorter side that a bucket has at most; what is longer is cropped"
    )
    multiple_of: int = Field(
        32, ge=1, description="sides of buckets are multiples of it; itself a multiple of the model's f"
    )

    def sizes(self, resolution: int) -> tuple[Size, ...]:
        """Of all buckets, by rising width / height; the square is one of them."""
        return _sizes(resolution, self.multiple_of, self.max_aspect)

    def size_at(self, number: int, resolution: int, stage_resolution: int) -> Size:
        """Of bucket `number` of `sizes(resolution)` at another resolution: the nearest in aspect ratio there is."""
        sizes = self.sizes(stage_resolution)
        width, height = self.sizes(resolution)[number]
        return sizes[AspectRatios(sizes).nearest(width, height)]

    def check(self, resolutions: Sequence[int]) -> None:
        """Raise ValueError where a resolution has no square bucket."""
        for resolution in resolutions:
            if resolution % self.multiple_of:
                raise ValueError(
                    f"the resolution {resolution} is no multiple of aspect_buckets.multiple_of {self.multiple_of}"
                )


@lru_cache(maxsize=64)
def _sizes(resolution: int, multiple_of: int, max_aspect: float) -> tuple[Size, ...]:
    return sizes_of_area(resolution**2, multiple_of, max_aspect)


def image_sizes(
    source: ImageSource,
    policy: DecodePolicy | None = None,
    *,
    rows: range | None = None,
    num_workers: int = 0,
    progress: bool = True,
) -> np.ndarray:
    """(N, 2) int32 width and height of every entry, as decoded; -1 where they cannot be told.

    Of files of this machine the headers are read, 16 at a time; of archives, datasets and URLs the whole images.

    Args:
        rows: the entries that are looked at, without gaps, so that processes can share the work; None: all.
        num_workers: processes that read; 0: this one.
    """
    rows = range(len(source)) if rows is None else rows
    blocks = [[(start, min(start + _BLOCK, rows.stop))] for start in range(rows.start, rows.stop, _BLOCK)]
    found = [np.empty((0, 2), np.int32)]
    read = load_batches(_Blocks(source, policy), iter(blocks), _only, min(num_workers, len(blocks)))
    with ImageProgress("image sizes", len(rows), enabled=progress) as shown:
        for sizes in read:
            found.append(sizes)
            shown.update(shown.done + len(sizes))
    return np.concatenate(found)


class _Blocks(Dataset[np.ndarray]):
    """(first entry, end) => their sizes, (n, 2) int32."""

    def __init__(self, source: ImageSource, policy: DecodePolicy | None) -> None:
        self.source = source
        self.policy = policy

    def __getitem__(self, block: tuple[int, int]) -> np.ndarray:
        entries = list(self.source.entries()[block[0] : block[1]])
        sizes = np.full((len(entries), 2), -1, np.int32)
        files = [place for place, entry in enumerate(entries) if _is_file(entry)]
        with ThreadPoolExecutor(_THREADS) as pool:
            for place, size in zip(
                files, pool.map(lambda place: _size(entries[place].uri, self.policy), files), strict=True
            ):
                sizes[place] = size
        others = [place for place, entry in enumerate(entries) if not _is_file(entry)]
        for places in (others[start : start + _HELD] for start in range(0, len(others), _HELD)):
            contents = self.source.fetch([entries[place] for place in places])
            sizes[places] = [_size(content, self.policy) for content in contents]
        return sizes


def _only(arrays: Sequence[np.ndarray]) -> np.ndarray:
    (array,) = arrays
    return array


def _is_file(entry: SourceEntry) -> bool:
    return entry.num_bytes is not None and entry.offset is None and "://" not in entry.uri


def _size(content: str | bytes | np.ndarray | Exception, policy: DecodePolicy | None) -> Size:
    if isinstance(content, np.ndarray):
        return (content.shape[1], content.shape[0]) if content.ndim >= 2 else (-1, -1)
    if isinstance(content, Exception):
        return (-1, -1)
    try:
        return probe_size(io.BytesIO(content) if isinstance(content, bytes) else content, policy)
    except (ImageError, OSError):
        return (-1, -1)


def assign(image_sizes: np.ndarray, buckets: Sequence[Size]) -> np.ndarray:
    """Number of the bucket nearest in aspect ratio, for each image: (N, 2) => (N,) int16.

    An image of unknown size goes to the square: training meets it there, and tells why it cannot be read.
    """
    ratios = AspectRatios(buckets)
    numbers = np.full(len(image_sizes), ratios.nearest(1, 1), np.int16)
    known = np.flatnonzero((image_sizes > 0).all(1))
    numbers[known] = ratios.nearest_of(image_sizes[known, 0], image_sizes[known, 1])
    return numbers


def merge(rates: Sequence[Fraction], buckets: Sequence[Size], batch: int) -> list[int]:
    """Which bucket the images of each go into: its own where an epoch of it fills a batch, else the nearest that does.

    `rates`: images an epoch holds of each bucket. Where none fills a batch all go into the fullest.
    """
    enough = [number for number, rate in enumerate(rates) if rate >= batch]
    if not enough:
        return [max(range(len(rates)), key=lambda number: rates[number])] * len(rates)
    return [
        number if number in enough else min(enough, key=lambda other: _distance(buckets[number], buckets[other]))
        for number in range(len(rates))
    ]


def _distance(one: Size, other: Size) -> float:
    """Ratio of the aspect ratios, the larger over the smaller: 1 for equal ones."""
    ratios = one[0] / one[1], other[0] / other[1]
    return max(ratios) / min(ratios)
