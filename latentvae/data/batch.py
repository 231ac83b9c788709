"""What a data pipeline gives: examples, and batches of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from latentvae.data.entries import ImageSource
from latentvae.errors import UserError
from latentvae.images import PixelFormat


@dataclass
class Batch:
    """Images of one forward pass, as they were read; `to_model` of latentvae.images turns them into floats."""

    images: Tensor  # (B, H, W, C) of the declared pixel dtype
    keys: list[str]  # B
    positions: list[int]  # B places in the global order of training images; or in the list of validation images
    unreadable: list[tuple[str, str]] = field(
        default_factory=list
    )  # (key, reason) of images met on the way that could not be used


@dataclass
class Example:
    """One position: its image, or None where nothing readable was found."""

    position: int
    key: str
    image: np.ndarray | None  # (H, W, C)
    unreadable: list[tuple[str, str]]


def collate(examples: Sequence[Example]) -> Batch:
    """Examples => a batch of those that have an image, and everything unreadable."""
    readable = [example for example in examples if example.image is not None]
    unreadable = [pair for example in examples for pair in example.unreadable]
    arrays = [example.image for example in readable if example.image is not None]
    images = torch.from_numpy(np.stack(arrays)) if arrays else torch.empty(0)
    return Batch(images, [example.key for example in readable], [example.position for example in readable], unreadable)


def check_format(batch: Batch, pixels: PixelFormat, source: ImageSource) -> None:
    """Raise a UserError where the images are not of the declared format."""
    if batch.images.shape[-1] != pixels.channels or batch.images.dtype != pixels.torch_dtype:
        raise UserError(
            f"{source.name} gives {batch.images.shape[-1]} channels of {batch.images.dtype}; "
            f"{pixels.channels} of {pixels.torch_dtype} are "
            f"declared: open the source with the same pixel format"
        )
