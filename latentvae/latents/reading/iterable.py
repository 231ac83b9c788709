"""Latents of stores that are too large for an index in memory, or too far away for random access."""

import hashlib
import heapq
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latentvae.errors import UserError
from latentvae.keyed import key_hash
from latentvae.latents.reading.draws import shuffled
from latentvae.latents.reading.items import COLUMNS, OWN_FIELDS, ItemReader, PosteriorMode, ReadOptions, Rows, rows_of
from latentvae.latents.reading.joins import PROBED, ArraysLike, CaptionsLike, Filter, Joins, filtered
from latentvae.latents.reading.mixing import require_alike, shares, with_weights
from latentvae.latents.reading.readable import Autoencoder, ReadableStore, UnitFiles
from latentvae.latents.reading.streams import Draw, LatentStream


class LatentIterableDataset(LatentStream):
    """Iterable over the images of a store that have latents, unit by unit.

    Over all ranks and DataLoader workers every item comes exactly once per epoch: units are dealt out to them. So ranks
    may get different numbers of items; where they must not, use LatentDataset with BucketBatchSampler. In memory are
    the names of the units, and the index rows of those that are in the buffer.

    Args:
        store, posterior, normalize, seed, partial, vae, captions, fields, hflip, filter, arrays, cache_dir,
            max_cache_bytes: as in LatentDataset. The seed is of the shuffling too.
        shuffle: units in an order decided by (seed, epoch), then items through a buffer. False: the store's order.
        buffer_size: items among which the next one is drawn; only their index rows are kept, not their latents.
        batch_size, drop_last, rank, num_replicas: see LatentStream.

    Raises UserError as LatentDataset does, for missing keys of `arrays` when their unit is read.
    """

    def __init__(
        self,
        store: str | Path,
        *,
        shuffle: bool = True,
        buffer_size: int = 4096,
        batch_size: int | None = None,
        drop_last: bool = False,
        posterior: PosteriorMode = "mode",
        normalize: bool = True,
        seed: int = 0,
        partial: bool = False,
        vae: Autoencoder | None = None,
        captions: CaptionsLike | None = None,
        fields: Sequence[str] = (),
        hflip: bool = False,
        filter: Filter | None = None,
        arrays: ArraysLike | None = None,
        rank: int | None = None,
        num_replicas: int | None = None,
        cache_dir: str | Path | None = None,
        max_cache_bytes: int | None = None,
    ) -> None:
        super().__init__(batch_size, drop_last, rank, num_replicas)
        if buffer_size < 1:
            raise UserError(f"buffer_size is {buffer_size}: it must be at least 1")
        self.shuffle, self.buffer_size, self.filter = shuffle, buffer_size, filter
        self.store = ReadableStore(
            store, partial=partial, vae=vae, cache_dir=cache_dir, max_cache_bytes=max_cache_bytes
        )
        self.options = ReadOptions(posterior, normalize, seed, hflip)
        joins = Joins(captions, fields, arrays, self.store.manifest, OWN_FIELDS)
        self._reader = ItemReader(self.store, self.options, joins)
        self._units = [unit for unit in self.store.units if unit.num_latents]
        if not self._units:
            raise UserError(f"{self.store.name} holds no latents: see the reasons in its index files")
        joins.check_captions(self._rows(self._units[0]).keys[:PROBED].to_pylist())

    @property
    def item_fields(self) -> list[str]:
        """Names of the fields of every item."""
        return self._reader.fields

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """(D, h, w) of the items, as far as the store's shards say."""
        return sorted({self._reader.shape(number) for unit in self._units for number in unit.shards})

    def identity(self) -> dict[str, Any]:
        """What decides the order: the units and their contents, and the settings of shuffling."""
        digest = hashlib.sha256("".join(unit.index_file.sha256 for unit in self._units).encode()).hexdigest()
        settings = {"seed": self.options.seed, "shuffle": self.shuffle, "buffer_size": self.buffer_size}
        return settings | {"store": digest[:16], "is_filtered": self.filter is not None}

    def count(self, epoch: int, consumer: int, num_consumers: int) -> int:
        """How many draws that stream has."""
        units = self._dealt(epoch, consumer, num_consumers, 0)
        if self.filter is None:
            return sum(unit.num_latents for unit in units)
        return sum(len(self._rows(unit)) for unit in units)

    def draws(self, epoch: int, consumer: int, num_consumers: int, turn: int = 0) -> Iterator[Draw]:
        """The items of one stream, each once; another order in each turn of the same epoch."""
        places = self._in_order(epoch, consumer, num_consumers, turn)
        if self.shuffle:
            seed = int.from_bytes(key_hash("buffer", self.options.seed, epoch, turn, consumer, num_consumers), "big")
            places = buffered(places, self.buffer_size, random.Random(seed))
        return (Draw(self._reader, rows, place) for rows, place in places)

    def _dealt(self, epoch: int, consumer: int, num_consumers: int, turn: int) -> list[UnitFiles]:
        """The units of one stream, in the order in which they are read."""
        order = np.arange(len(self._units))
        if self.shuffle:
            order = shuffled(order.astype(np.uint64), "units", self.options.seed, epoch)
        mine = order[consumer::num_consumers]
        if turn:  # the same units again
            mine = mine[shuffled(mine.astype(np.uint64), "turn", self.options.seed, epoch, turn)]
        return [self._units[number] for number in mine.tolist()]

    def _in_order(self, epoch: int, consumer: int, num_consumers: int, turn: int) -> Iterator[tuple[Rows, int]]:
        for unit in self._dealt(epoch, consumer, num_consumers, turn):
            rows = self._rows(unit)
            order = np.arange(len(rows))
            if self.shuffle:
                order = shuffled(order.astype(np.uint64), "rows", self.options.seed, epoch, turn, unit.number)
            for place in order.tolist():
                yield rows, place

    def _rows(self, unit: UnitFiles) -> Rows:
        """The rows of a unit that are wanted."""
        table = self.store.index(unit, COLUMNS if self.filter is None else None)
        rows = rows_of(self.store, [unit], [filtered(table, self.filter, self.store.name)])
        self._reader.joins.check_arrays(rows.keys.to_pylist() if self._reader.joins.arrays else [])
        return rows


class MixedLatentIterableDataset(LatentStream):
    """Iterable over several datasets, their items interleaved evenly.

    With weights, a stream (of a rank and worker) has as many draws per epoch as there are items in it, and each
    dataset's share of them is its weight over the sum of the weights: of some it takes a part, others it goes through
    again, in a new order. Without weights every item comes once per epoch.

    Args:
        datasets: each with its weight, or all without. Their items must have the same fields and number of channels;
            their own batch_size, drop_last, rank and num_replicas are not used.
        batch_size, drop_last, rank, num_replicas: see LatentStream.
    """

    def __init__(
        self,
        datasets: Sequence[LatentIterableDataset | tuple[LatentIterableDataset, float]],
        *,
        batch_size: int | None = None,
        drop_last: bool = False,
        rank: int | None = None,
        num_replicas: int | None = None,
    ) -> None:
        super().__init__(batch_size, drop_last, rank, num_replicas)
        self.datasets, self.weights = with_weights(datasets)
        require_alike(self.datasets)

    def identity(self) -> dict[str, Any]:
        """Of every dataset, and the weights."""
        return {"weights": self.weights, "datasets": [dataset.identity() for dataset in self.datasets]}

    def count(self, epoch: int, consumer: int, num_consumers: int) -> int:
        """How many draws that stream has."""
        return sum(dataset.count(epoch, consumer, num_consumers) for dataset in self.datasets)

    def draws(self, epoch: int, consumer: int, num_consumers: int, turn: int = 0) -> Iterator[Draw]:
        """The draws of one stream: always of the dataset that lags most behind its share."""
        counts = [dataset.count(epoch, consumer, num_consumers) for dataset in self.datasets]
        wanted = counts
        if self.weights:
            weights = [weight if count else 0.0 for weight, count in zip(self.weights, counts, strict=True)]
            wanted = shares(counts, weights) if sum(weights) else [0] * len(counts)
        streams = [self._endless(dataset, epoch, consumer, num_consumers, turn) for dataset in self.datasets]
        lag = [(0.5 / share, number) for number, share in enumerate(wanted) if share]
        heapq.heapify(lag)
        for _ in range(sum(wanted)):
            position, number = lag[0]
            yield next(streams[number])
            heapq.heapreplace(lag, (position + 1 / wanted[number], number))

    @staticmethod
    def _endless(
        dataset: LatentIterableDataset, epoch: int, consumer: int, num_consumers: int, turn: int
    ) -> Iterator[Draw]:
        """One turn after the other."""
        while True:
            yield from dataset.draws(epoch, consumer, num_consumers, turn)
            turn += 1


def buffered(
    places: Iterator[tuple[Rows, int]], buffer_size: int, generator: random.Random
) -> Iterator[tuple[Rows, int]]:
    """Each once: the next one is drawn from a buffer that is filled up again from the front of `places`."""
    buffer = []
    for place in places:
        buffer.append(place)
        if len(buffer) > buffer_size:
            yield _taken(buffer, generator)
    while buffer:
        yield _taken(buffer, generator)


def _taken(buffer: list[tuple[Rows, int]], generator: random.Random) -> tuple[Rows, int]:
    chosen = int(generator.random() * len(buffer))
    buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
    return buffer.pop()
