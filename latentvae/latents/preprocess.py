"""From a planned image to pixels of the bucket's size; runs in worker processes."""

import bisect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from latentvae.data.sources import ImageSource
from latentvae.images import DecodePolicy, ImageError, crop, resize
from latentvae.images.geometry import ResizeFilter
from latentvae.latents.plan import PlannedImage, Unit
from latentvae.latents.records import Bucket, IndexRow
from latentvae.latents.store import content_hash

SmallPolicy = Literal["skip", "upscale"]


@dataclass(frozen=True)
class Prepared:
    """An input: pixels (H, W, C), or none and the reason in its index row."""

    row: IndexRow
    image: np.ndarray | None


@dataclass(frozen=True)
class Piece:
    """Inputs as they leave a worker. Their pixels are one tensor: every tensor on its way takes an open file."""

    rows: list[IndexRow]
    images: Tensor  # (n, H, W, C) of the n rows that are ok so far, in their order

    @classmethod
    def of(cls, inputs: Sequence[Prepared]) -> "Piece":
        """Stack what can be encoded; all have the bucket's size."""
        images = [prepared.image for prepared in inputs if prepared.image is not None]
        stacked = torch.from_numpy(np.stack(images)) if images else torch.empty(0)
        return cls([prepared.row for prepared in inputs], stacked)


class UnitImages(Dataset[Prepared]):
    """Map-style over the images of `units`, in order: decode, resize to cover the bucket, crop the centre."""

    def __init__(
        self,
        source: ImageSource,
        positions: Mapping[str, int],
        units: Sequence[Unit],
        bucket: Bucket,
        policy: DecodePolicy,
        filter: ResizeFilter,
        small: SmallPolicy,
    ) -> None:
        """`positions`: key -> index in the source; a planned key that is not there becomes an error row."""
        self.source, self.positions, self.units, self.bucket = source, positions, units, bucket
        self.policy, self.filter, self.small = policy, filter, small
        self.ends = list(itertools.accumulate(len(unit.images) for unit in units))

    def __len__(self) -> int:
        return self.ends[-1]

    def pieces(self, size: int) -> Iterator[list[int]]:
        """All indices in order, in pieces of at most `size` that never cross a unit."""
        for begin, end in zip([0, *self.ends], self.ends, strict=False):
            for start in range(begin, end, size):
                yield list(range(start, min(start + size, end)))

    def __getitem__(self, index: int) -> Prepared:
        number = bisect.bisect_right(self.ends, index)
        planned = self.units[number].images[index - self.ends[number]]  # counted from the unit's end
        row = IndexRow(key=planned.key, row=-1, status="error", width=planned.width, height=planned.height)
        try:
            return self._prepare(planned, row)
        except (ImageError, OSError) as error:  # the reason goes into the index, the run goes on
            return Prepared(replace(row, error=_reason(error)), None)

    def _prepare(self, planned: PlannedImage, row: IndexRow) -> Prepared:
        if planned.key not in self.positions:
            raise ImageError("it is no longer in the source")
        if planned.size is not None:
            row = replace(row, source_hash=content_hash(Path(planned.uri)))
        try:
            array = self.source.read(self.positions[planned.key])
        except (ImageError, OSError) as error:
            return Prepared(replace(row, error=_reason(error)), None)
        if planned.size is None:
            row = replace(row, source_hash=content_hash(array))

        height, width = array.shape[:2]
        row = replace(row, width=width, height=height)
        scale = max(self.bucket.width / width, self.bucket.height / height)
        if scale > 1 and self.small == "skip":
            reason = f"{width}x{height} is smaller than {self.bucket.name}: lower --resolution, or --small upscale"
            return Prepared(replace(row, status="skipped", error=reason), None)
        scaled_width = max(self.bucket.width, round(width * scale))
        scaled_height = max(self.bucket.height, round(height * scale))
        if scaled_width * scaled_height > max(self.policy.max_pixels, width * height):
            raise ImageError(f"enlarged to {scaled_width}x{scaled_height} it exceeds {self.policy.max_pixels} pixels")
        top, left = (scaled_height - self.bucket.height) // 2, (scaled_width - self.bucket.width) // 2
        if (scaled_width, scaled_height) != (width, height):
            array = resize(array, (scaled_width, scaled_height), filter=self.filter)
        array = crop(array, top, left, self.bucket.height, self.bucket.width)
        row = replace(
            row,
            status="ok",
            scaled_width=scaled_width,
            scaled_height=scaled_height,
            crop_top=top,
            crop_left=left,
        )
        return Prepared(row, array)


def _reason(error: Exception) -> str:
    """One line."""
    text = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
    return " ".join(text.split()) or type(error).__name__
