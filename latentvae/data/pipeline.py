"""The endless, reproducible order of training images, their augmentation, and the batches made of them.

Nothing is streamed from a random state: the image at a position depends on (seed, position), its augmentation on (seed,
epoch, key), its size on the first position of its step. The number of workers or processes, the size of a micro-batch
and the point of a resume therefore change no pixel.
"""

from collections.abc import Generator, Iterator, Sequence

import numpy as np
from torch.utils.data import Dataset

from latentvae.data.aspect import image_sizes
from latentvae.data.augment import DataConfig, augment
from latentvae.data.batch import Batch, Example, check_format, collate
from latentvae.data.entries import ImageSource
from latentvae.data.grouping import bucket_groups, groups_by_source
from latentvae.data.order import Stream, TrainingOrder, derived_seed
from latentvae.data.unreadable import UnreadableImages
from latentvae.data.validation import validation_batches, validation_indices
from latentvae.data.workers import load_batches
from latentvae.errors import UserError
from latentvae.images import ImageError, PixelFormat
from latentvae.keyed import split_by_key, uniforms

__all__ = [
    "Batch",
    "DataConfig",
    "TrainingImages",
    "UnreadableImages",
    "micro_batch_size_of",
    "split_by_key",
    "training_batches",
    "validation_batches",
    "validation_indices",
]


class TrainingImages(Dataset[Example]):
    """Positions 0, 1, 2, ... of the endless global order of training images; an epoch is each image once, shuffled.

    Or as often as its source repeats. An unreadable image is replaced by another one of its bucket, chosen by (seed,
    position, attempt), and reported in its place.
    """

    def __init__(
        self,
        source: ImageSource,
        config: DataConfig,
        seed: int,
        indices: Sequence[int] | None = None,
        *,
        start_image: int = 0,
        global_batch_size: int = 1,
        sizes: np.ndarray | None = None,
    ) -> None:
        """`start_image` and `global_batch_size` say where steps begin; `sizes` as for `training_batches`."""
        self.source = source
        self.config = config
        self.seed = seed
        self.start_image = start_image
        self.global_batch_size = global_batch_size
        chosen = np.arange(len(source)) if indices is None else np.asarray(indices, dtype=np.int64)
        if len(chosen) == 0:
            raise UserError(f"no image of {source.name} is left to train on: lower validation.fraction or add images")
        groups = groups_by_source(source, config, chosen)
        buckets = bucket_groups(source, config, groups, global_batch_size, sizes)
        self.buckets = list(buckets)  # number of the bucket of each stream
        seeds = [seed] if len(buckets) == 1 else [derived_seed(seed, "bucket", number) for number in buckets]
        streams = [Stream(own, key) for own, key in zip(buckets.values(), seeds, strict=True)]
        self.order = TrainingOrder(streams, seed, global_batch_size)
        if self.order.rate < 1:
            raise UserError(f"an epoch holds {float(self.order.rate):g} images: raise repeats in data.sources")
        if len(streams) > 1 and start_image % global_batch_size:
            raise UserError(
                f"the run goes on at image {start_image}, which is no multiple of global_batch_size "
                f"{global_batch_size}: with data.aspect_buckets keep the batch size that it had"
            )

    def __len__(self) -> int:
        """Images per epoch. Positions go on beyond it."""
        return int(self.order.rate)

    def __getitem__(self, position: int) -> Example:
        place = self.order.place(position)
        stream = self.order.streams[place.bucket]
        drawn = stream.draw(place.position)
        step_start = position - (position - self.start_image) % self.global_batch_size
        size = self.config.size_at(self.buckets[place.bucket], step_start)
        unreadable: list[tuple[str, str]] = []
        # enough tries to exceed the limit, and to find the last readable one of a small set
        for attempt in range(self.config.max_unreadable + 64):
            index = drawn.index if attempt == 0 else self._replacement(stream, position, attempt)
            key = self.source.entries()[index].key
            try:
                image = self.source.read(index)
                image = augment(image, self.config, self.seed, drawn.epoch, key, size=size, copy=drawn.copy)
                return Example(position, key, image, unreadable)
            except ImageError as error:
                if (key, str(error)) not in unreadable:
                    unreadable.append((key, str(error)))
            if len(unreadable) > self.config.max_unreadable:
                break
        return Example(position, "", None, unreadable)

    def _replacement(self, stream: Stream, position: int, attempt: int) -> int:
        place = int(uniforms("replacement", self.seed, position, attempt)[0] * len(stream.indices))
        return int(stream.indices[place])


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
    sizes: np.ndarray | None = None,
) -> Generator[list[Batch], None, None]:
    """Endless: one item per optimizer step, the list of this process's micro-batches.

    The step that starts at image s takes the positions s to s + global_batch_size of the global order; process r of P
    owns the r-th of P equal, contiguous parts. All images of a step are of one size, on all processes. `start_image`
    is the number of images seen before (a resume gives another one). `indices` limits the source to some of its
    entries. `sizes`, from `image_sizes` of the whole source, saves reading them where there are aspect-ratio buckets.
    More than `config.max_unreadable` distinct unreadable images raise a UserError that names the first ones.
    """
    if global_batch_size < 1 or micro_batch_size < 1 or global_batch_size % num_processes:
        raise UserError(
            f"global_batch_size {global_batch_size} and micro_batch_size {micro_batch_size} must be positive, "
            f"and the first a multiple of the {num_processes} processes"
        )
    per_process = global_batch_size // num_processes
    size = micro_batch_size_of(per_process, micro_batch_size)
    if sizes is None and config.aspect_buckets is not None:
        sizes = image_sizes(source, config.policy, num_workers=config.num_workers, progress=process_index == 0)
    dataset = TrainingImages(
        source,
        config,
        seed,
        indices,
        start_image=start_image,
        global_batch_size=global_batch_size,
        sizes=sizes,
    )
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
        check_format(batch, pixels, dataset.source)
        step.append(batch)
        if len(step) * size == per_process:
            yield step
            step = []
