"""Streams of items over ranks and workers: batches of one shape, and exact resume. What iterable datasets share."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from latentvae.errors import UserError
from latentvae.latents.reading.items import ItemReader, LatentItem, Rows, picked
from latentvae.latents.reading.sampler import process_place, require_same_pass

READ_TOGETHER = 32  # items, where there are no batches


class Draw(NamedTuple):
    """One item to come: nothing of it is read yet but its row of the index."""

    reader: ItemReader
    rows: Rows
    place: int


class LatentStream(IterableDataset[Any], ABC):
    """An iterable over draws, divided among ranks and DataLoader workers.

    Args:
        batch_size: yield collated batches of one latent shape (for `DataLoader(..., batch_size=None)`); None: items.
        drop_last: leave out the batches at the end that are not full, one per shape and worker.
        rank, num_replicas: as in BucketBatchSampler.
    """

    def __init__(self, batch_size: int | None, drop_last: bool, rank: int | None, num_replicas: int | None) -> None:
        super().__init__()
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: it must be at least 1, or None for single items")
        self.batch_size, self.is_dropping = batch_size, drop_last
        self.rank, self.num_replicas = process_place(rank, num_replicas)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that live on
        self._given = (0, 0)  # epoch, what was yielded of it in this process
        self._resumed: tuple[int, list[tuple[int, int]]] = (-1, [])  # epoch, (stream, yielded of it) for each worker

    @abstractmethod
    def draws(self, epoch: int, consumer: int, num_consumers: int, turn: int = 0) -> Iterator[Draw]:
        """The items of one of `num_consumers` streams, each once; another order in each turn of the same epoch."""

    @abstractmethod
    def count(self, epoch: int, consumer: int, num_consumers: int) -> int:
        """How many draws that stream has."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides the order."""

    @property
    def epoch(self) -> int:
        """See `set_epoch`."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Before each pass: another order, other noise and mirroring. Reaches persistent workers too."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info is not None else (0, 1)
        epoch = self.epoch
        stream, done = worker, 0
        if self._resumed[0] == epoch:
            streams = self._resumed[1]
            if len(streams) != num_workers:
                raise UserError(
                    f"the state is of {len(streams)} reading processes and here are {num_workers}: "
                    "continue with the same num_workers, or begin the next epoch"
                )
            stream, done = streams[worker]
        self._given = (epoch, done)
        return self._values(epoch, stream, num_workers, done)

    def _values(self, epoch: int, stream: int, num_workers: int, done: int) -> Iterator[Any]:
        for group in self._groups(epoch, stream, num_workers, done):
            items = read_draws(group, epoch)
            for value in items if self.batch_size is None else [default_collate(items)]:
                done += 1
                self._given = (epoch, done)
                yield value

    def _groups(self, epoch: int, stream: int, num_workers: int, done: int) -> Iterator[list[Draw]]:
        """What is read together, without what the first `done` items or batches were."""
        draws = self.draws(epoch, self.rank * num_workers + stream, self.num_replicas * num_workers)
        if self.batch_size is not None:
            yield from islice(same_shape(draws, self.batch_size, self.is_dropping), done, None)
            return
        draws = islice(draws, done, None)
        while group := list(islice(draws, READ_TOGETHER)):
            yield group

    def state_dict(
        self, batches: int | None = None, *, num_workers: int = 0, batch_size: int | None = None
    ) -> dict[str, Any]:
        """Where this pass stands.

        Args:
            batches: how many of this epoch were taken from a DataLoader. None: what this process yielded itself, for
                num_workers=0 and items that are not batched by the DataLoader ahead of the state.
            num_workers, batch_size: of that DataLoader (which must not drop its last batches).
        """
        streams = max(1, num_workers)
        if batches is None:
            if num_workers:
                raise UserError("a DataLoader with workers reads ahead: give state_dict the number of batches taken")
            epoch, given = self._given if self._given[0] == self.epoch else (self.epoch, 0)
            return {"epoch": epoch, "streams": [[0, given]], **self._settings()}
        together = 1 if self.batch_size is not None else batch_size or 1
        lengths = [self._length(stream, streams) for stream in range(streams)]
        order = dealt([-(-length // together) for length in lengths], batches)
        places = [[stream, min(taken * together, lengths[stream])] for stream, taken in order]
        return {"epoch": self.epoch, "streams": places, **self._settings()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a pass: sets the epoch, in which what was taken does not come again. UserError for another order."""
        require_same_pass(state, self._settings(), "dataset")
        self.set_epoch(int(state["epoch"]))
        self._resumed = self.epoch, [(int(stream), int(given)) for stream, given in state["streams"]]
        self._given = self.epoch, self._resumed[1][0][1]

    def _settings(self) -> dict[str, Any]:
        own = {"batch_size": self.batch_size, "drop_last": self.is_dropping, "num_replicas": self.num_replicas}
        return own | {"rank": self.rank} | self.identity()

    def _length(self, stream: int, num_workers: int) -> int:
        """Items or batches of a stream in this epoch."""
        if self.batch_size is None:
            return self.count(self.epoch, self.rank * num_workers + stream, self.num_replicas * num_workers)
        return sum(1 for _ in self._groups(self.epoch, stream, num_workers, 0))


def same_shape(draws: Iterator[Draw], batch_size: int, drop_last: bool) -> Iterator[list[Draw]]:
    """Batches of draws whose latents have one shape; the rests come last, unless dropped."""
    waiting: dict[tuple[int, int, int], list[Draw]] = {}
    for draw in draws:
        shape = draw.reader.shape(int(draw.rows.shard[draw.place]))
        batch = waiting.setdefault(shape, [])
        batch.append(draw)
        if len(batch) == batch_size:
            yield waiting.pop(shape)
    if not drop_last:
        yield from waiting.values()


def read_draws(draws: Sequence[Draw], epoch: int) -> list[LatentItem]:
    """The items, in the order of the draws."""
    items: list[LatentItem | None] = [None] * len(draws)
    readers = {id(draw.reader): draw.reader for draw in draws}
    for number, reader in readers.items():
        places = [place for place, draw in enumerate(draws) if id(draw.reader) == number]
        rows = picked([(draws[place].rows, draws[place].place) for place in places])
        for place, item in zip(places, reader.read(rows, np.arange(len(rows)), epoch), strict=True):
            items[place] = item
    return [item for item in items if item is not None]


def dealt(lengths: Sequence[int], batches: int) -> list[tuple[int, int]]:
    """Which worker gives the next batches and how many each has given, after `batches` of a DataLoader.

    It takes from its workers in turn and passes over those that have ended; here they come last.
    """
    if batches > sum(lengths):
        raise UserError(f"batches is {batches}: this epoch has {sum(lengths)}")
    taken, waiting, ended = [0] * len(lengths), list(range(len(lengths))), []
    turn = 0
    for _ in range(batches):
        while taken[waiting[turn]] == lengths[waiting[turn]]:
            ended.append(waiting.pop(turn))
            turn %= len(waiting)
        taken[waiting[turn]] += 1
        turn = (turn + 1) % len(waiting)
    return [(worker, taken[worker]) for worker in [*waiting[turn:], *waiting[:turn], *ended]]
