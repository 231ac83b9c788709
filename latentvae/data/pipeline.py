"""The endless, reproducible order of training images, their augmentation, and the batches made of them.

Nothing is streamed from a random state: the image at a position depends on (seed, position), its augmentation on (seed,
epoch, key). The number of workers or processes, the size of a micro-batch and the point of a resume therefore change no
pixel.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from latentvae.data.augment import DataConfig, augment
from latentvae.data.entries import ImageSource
from latentvae.data.unreadable import UnreadableImages
from latentvae.data.workers import load_batches
from latentvae.errors import UserError
from latentvae.images import ImageError, PixelFormat
from latentvae.keyed import key_hash, permutation, split_by_key, uniforms

__all__ = [
    "Batch",
    "DataConfig",
    "TrainingImages",
    "UnreadableImages",
    "split_by_key",
    "training_batches",
    "validation_batches",
]


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


class TrainingImages(Dataset[Example]):
    """Positions 0, 1, 2, ... of the endless global order of training images; one epoch is each image once, shuffled.

    An unreadable image is replaced by another one, chosen by (seed, position, attempt), and reported in its place.
    """

    def __init__(
        self, source: ImageSource, config: DataConfig, seed: int, indices: Sequence[int] | None = None
    ) -> None:
        self.source = source
        self.config = config
        self.seed = seed
        self.indices = np.arange(len(source)) if indices is None else np.asarray(indices, dtype=np.int64)
        if len(self.indices) == 0:
            raise UserError(f"no image of {source.name} is left to train on: lower validation.fraction or add images")

    def __len__(self) -> int:
        """Images per epoch. Positions go on beyond it."""
        return len(self.indices)

    def _index(self, position: int, attempt: int) -> int:
        count = len(self.indices)
        if attempt == 0:
            return int(self.indices[permutation(self.seed, position // count, count)[position % count]])
        return int(self.indices[int(uniforms("replacement", self.seed, position, attempt)[0] * count)])

    def __getitem__(self, position: int) -> Example:
        unreadable: list[tuple[str, str]] = []
        # enough tries to exceed the limit, and to find the last readable one of a small set
        for attempt in range(self.config.max_unreadable + 64):
            index = self._index(position, attempt)
            key = self.source.entries()[index].key
            try:
                image = augment(self.source.read(index), self.config, self.seed, position // len(self.indices), key)
                return Example(position, key, image, unreadable)
            except ImageError as error:
                if (key, str(error)) not in unreadable:
                    unreadable.append((key, str(error)))
            if len(unreadable) > self.config.max_unreadable:
                break
        return Example(position, "", None, unreadable)


class _CenteredImages(Dataset[Example]):
    """Validation image `position`: the shorter side resized to the resolution, the middle cut out; no replacement."""

    def __init__(self, source: ImageSource, config: DataConfig, resolution: int, indices: Sequence[int]) -> None:
        self.source = source
        self.config = config.model_copy(update={"resolution": resolution, "crop": "center", "horizontal_flip": False})
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Example:
        index = self.indices[position]
        key = self.source.entries()[index].key
        try:
            return Example(position, key, augment(self.source.read(index), self.config, 0, 0, key), [])
        except ImageError as error:
            return Example(position, key, None, [(key, str(error))])


def collate(examples: Sequence[Example]) -> Batch:
    """Examples => a batch of those that have an image, and everything unreadable."""
    readable = [example for example in examples if example.image is not None]
    unreadable = [pair for example in examples for pair in example.unreadable]
    arrays = [example.image for example in readable if example.image is not None]
    images = torch.from_numpy(np.stack(arrays)) if arrays else torch.empty(0)
    return Batch(images, [example.key for example in readable], [example.position for example in readable], unreadable)


def micro_batch_size_of(per_process: int, limit: int) -> int:
    """The largest divisor of `per_process` images that is not above `limit`."""
    return max(size for size in range(1, min(per_process, limit) + 1) if per_process % size == 0)


def training_batches(
    source: ImageSource,
    config: DataConfig,
    pixels: PixelFormat,
    *,
    seed: int,
    start_image: int,
    global_batch_size: int,
    micro_batch_size: int,
    process_index: int = 0,
    num_processes: int = 1,
    indices: Sequence[int] | None = None,
) -> Generator[list[Batch], None, None]:
    """Endless: one item per optimizer step, the list of this process's micro-batches.

    The step that starts at image s takes the positions s to s + global_batch_size of the global order; process r of P
    owns the r-th of P equal, contiguous parts. `start_image` is the number of images seen before (a resume gives
    another one). `indices` limits the source to some of its entries. More than `config.max_unreadable` distinct
    unreadable images raise a UserError that names the first ones.
    """
    if global_batch_size < 1 or micro_batch_size < 1 or global_batch_size % num_processes:
        raise UserError(
            f"global_batch_size {global_batch_size} and micro_batch_size {micro_batch_size} must be positive, "
            f"and the first a multiple of the {num_processes} processes"
        )
    per_process = global_batch_size // num_processes
    size = micro_batch_size_of(per_process, micro_batch_size)
    dataset = TrainingImages(source, config, seed, indices)
    first = start_image + process_index * per_process
    return _steps(dataset, pixels, config, first, global_batch_size, per_process, size)


def _steps(
    dataset: TrainingImages,
    pixels: PixelFormat,
    config: DataConfig,
    first: int,
    stride: int,
    per_process: int,
    size: int,
) -> Generator[list[Batch], None, None]:
    def positions() -> Iterator[list[int]]:
        start = first
        while True:
            for offset in range(start, start + per_process, size):
                yield list(range(offset, offset + size))
            start += stride

    unreadable = UnreadableImages(config.max_unreadable)
    step: list[Batch] = []
    for batch in load_batches(dataset, positions(), collate, config.num_workers):
        unreadable.add(batch.unreadable)
        if len(batch.keys) < size:
            raise UserError(f"no readable image was found in {dataset.source.name}: {unreadable.describe()}")
        _check_format(batch, pixels, dataset.source)
        step.append(batch)
        if len(step) * size == per_process:
            yield step
            step = []


def _check_format(batch: Batch, pixels: PixelFormat, source: ImageSource) -> None:
    if batch.images.shape[-1] != pixels.channels or batch.images.dtype != pixels.torch_dtype:
        raise UserError(
            f"{source.name} gives {batch.images.shape[-1]} channels of {batch.images.dtype}; "
            f"{pixels.channels} of {pixels.torch_dtype} are "
            f"declared: open the source with the same pixel format"
        )


def validation_batches(
    source: ImageSource,
    config: DataConfig,
    pixels: PixelFormat,
    *,
    resolution: int,
    batch_size: int,
    max_images: int | None = None,
    process_index: int = 0,
    num_processes: int = 1,
    indices: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Each of the first `max_images` images, in the order of their keys' hashes, once over all processes.

    (B, resolution, resolution, C): shorter side resized, centre cut out. Every batch but the last is full; unreadable
    images are left out and reported with a batch near them. Where none of this process's share is
    readable, one empty batch reports them.
    """
    keys = source.entries().keys
    chosen = sorted(
        range(len(keys)) if indices is None else indices, key=lambda index: key_hash("validation", keys[index])
    )
    chosen = chosen[:max_images]
    dataset = _CenteredImages(source, config, resolution, chosen)
    mine = list(range(process_index, len(chosen), num_processes))
    parts = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    workers = min(config.num_workers, len(parts))
    waiting: list[Example] = []
    unreadable: list[tuple[str, str]] = []
    ready: Batch | None = None  # held back by one, so that what is unreadable at the very end has a batch to go with
    for examples in load_batches(dataset, iter(parts), list, workers):
        for example in examples:
            if example.image is None:
                unreadable.extend(example.unreadable)
            else:
                waiting.append(example)
        if len(waiting) >= batch_size:
            if ready is not None:
                yield ready
            ready = collate(waiting[:batch_size])
            waiting = waiting[batch_size:]
            ready.unreadable, unreadable = unreadable, []
            _check_format(ready, pixels, source)
    if waiting:
        if ready is not None:
            yield ready
        ready = collate(waiting)
        _check_format(ready, pixels, source)
    if ready is None and unreadable:
        ready = collate([])  # other processes may have readable ones: only the caller can tell that there are none
    if ready is not None:
        ready.unreadable.extend(unreadable)
        yield ready
