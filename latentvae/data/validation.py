"""Validation images: the same ones each time, each once over all processes, resized and cut in the middle."""

from collections.abc import Iterator, Sequence

from torch.utils.data import Dataset

from latentvae.data.augment import DataConfig, augment
from latentvae.data.batch import Batch, Example, check_format, collate
from latentvae.data.entries import ImageSource
from latentvae.data.workers import load_batches
from latentvae.images import ImageError, PixelFormat
from latentvae.keyed import key_hash


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


def validation_indices(
    source: ImageSource, indices: Sequence[int] | None = None, max_images: int | None = None
) -> list[int]:
    """The first `max_images` of the entries `indices` (None: all), in the order of their keys' hashes."""
    keys = source.entries().keys
    places = range(len(keys)) if indices is None else indices
    return sorted(places, key=lambda index: key_hash("validation", keys[index]))[:max_images]


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
    chosen: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Each of the first `max_images` images, in the order of their keys' hashes, once over all processes.

    `chosen`, from `validation_indices`, stands in for `max_images` and `indices`: choosing looks at every key.

    (B, resolution, resolution, C): shorter side resized, centre cut out. Every batch but the last is full; unreadable
    images are left out and reported with a batch near them. Where none of this process's share is
    readable, one empty batch reports them.
    """
    if chosen is None:
        chosen = validation_indices(source, indices, max_images)
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
            check_format(ready, pixels, source)
    if waiting:
        if ready is not None:
            yield ready
        ready = collate(waiting)
        check_format(ready, pixels, source)
    if ready is None and unreadable:
        ready = collate([])  # other processes may have readable ones: only the caller can tell that there are none
    if ready is not None:
        ready.unreadable.extend(unreadable)
        yield ready
