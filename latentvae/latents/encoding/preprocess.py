"""From planned images to pixels of their buckets' sizes; runs in worker processes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from latentvae.data.entries import ImageSource
from latentvae.images import DecodePolicy, ImageError, crop, resize
from latentvae.images.geometry import ResizeFilter
from latentvae.latents.store.buckets import BucketRule
from latentvae.latents.store.files import content_hash
from latentvae.latents.store.plan import PlannedImage
from latentvae.latents.store.records import IndexRow


@dataclass(frozen=True)
class Prepared:
    """An input: pixels (H, W, C), or none and the reason in its index row."""

    row: IndexRow
    image: np.ndarray | None


@dataclass(frozen=True)
class Piece:
    """Inputs as they leave a worker. Their pixels are one tensor: every tensor on its way takes an open file."""

    rows: list[IndexRow]
    shapes: list[tuple[int, ...]]  # (H, W, C) of each row that is ok so far
    pixels: Tensor  # of them all, one after the other

    @classmethod
    def of(cls, inputs: Sequence[Prepared]) -> "Piece":
        """Join what can be encoded."""
        images = [prepared.image for prepared in inputs if prepared.image is not None]
        flat = torch.from_numpy(np.concatenate([image.reshape(-1) for image in images])) if images else torch.empty(0)
        return cls([prepared.row for prepared in inputs], [image.shape for image in images], flat)

    def images(self) -> list[Tensor]:
        """(H, W, C) of each row that is ok so far, in their order."""
        parts = self.pixels.split([int(np.prod(shape)) for shape in self.shapes]) if self.shapes else ()
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]


class UnitImages(Dataset[Prepared]):
    """Planned images to prepared ones: fetch, decode, resize to cover the bucket, crop the centre."""

    def __init__(self, source: ImageSource, rule: BucketRule, policy: DecodePolicy, filter: ResizeFilter) -> None:
        self.source, self.rule, self.policy, self.filter = source, rule, policy, filter

    def __getitem__(self, planned: PlannedImage) -> Prepared:
        return self.__getitems__([planned])[0]

    def __getitems__(self, planned: Sequence[PlannedImage]) -> list[Prepared]:
        """Neighbours together: an archive gives them in one read."""
        contents = self.source.fetch([image.entry for image in planned])
        return [self._prepared(image, content) for image, content in zip(planned, contents, strict=True)]

    def _prepared(self, planned: PlannedImage, content: bytes | np.ndarray | Exception) -> Prepared:
        row = IndexRow(key=planned.key, row=-1, status="error")  # the planned size may be that of an older file
        if not isinstance(content, Exception):
            row = replace(row, source_hash=content_hash(content))
        try:
            if isinstance(content, Exception):
                raise content
            return self._placed(self.source.decode(content), row)
        except (ImageError, OSError) as error:  # the reason goes into the index, the run goes on
            return Prepared(replace(row, error=_reason(error)), None)

    def _placed(self, array: np.ndarray, row: IndexRow) -> Prepared:
        height, width = array.shape[:2]
        row = replace(row, width=width, height=height)
        place = self.rule.place(width, height)
        if isinstance(place, str):
            return Prepared(replace(row, status="skipped", error=place), None)
        scaled = place.scaled_width, place.scaled_height
        if scaled[0] * scaled[1] > max(self.policy.max_pixels, width * height):
            raise ImageError(f"enlarged to {scaled[0]}x{scaled[1]} it exceeds {self.policy.max_pixels} pixels")
        if scaled != (width, height):
            array = resize(array, scaled, filter=self.filter)
        array = crop(array, place.crop_top, place.crop_left, place.bucket.height, place.bucket.width)
        row = replace(
            row,
            status="ok",
            bucket=place.bucket.name,
            scaled_width=place.scaled_width,
            scaled_height=place.scaled_height,
            crop_top=place.crop_top,
            crop_left=place.crop_left,
        )
        return Prepared(row, array)


def crashed(planned: PlannedImage) -> Prepared:
    """Of an image that ends the process which decodes it."""
    reason = "the process that decoded it died: a crash in a decoder, or out of memory"
    return Prepared(IndexRow(key=planned.key, row=-1, status="error", error=reason), None)


def _reason(error: Exception) -> str:
    """One line."""
    text = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
    return " ".join(text.split()) or type(error).__name__
