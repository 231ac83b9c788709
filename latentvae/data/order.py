"""The endless order of training images: which image, of which epoch, lies at a position.

Everything follows from the seed and the position, without a state: epochs begin where a formula says, so that any
process finds its images, and a resume its place, without going through those before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from latentvae.keyed import key_hash, permutation

_KEPT = 2  # epochs that stay laid out: a batch may begin in one and end in the next


@dataclass(frozen=True, slots=True)
class Draw:
    """What lies at one position of a stream."""

    index: int  # of the source's entries
    epoch: int  # of the stream
    copy: int  # how often the epoch holds this image besides: 0 is the first of its copies


@dataclass(frozen=True)
class Group:
    """Images that an epoch holds equally often."""

    indices: np.ndarray  # (n,) int64, of the source's entries
    repeats: Fraction = Fraction(1)  # how often an epoch holds each, on average over epochs


@dataclass(frozen=True)
class _Epoch:
    """The layout of one epoch."""

    start: int  # position of its first image
    order: np.ndarray  # (images,) int64: which of its images is shown when
    ends: np.ndarray | None  # (n,) int64: up to where, before shuffling, the copies of each lie; None: one copy of each


class Stream:
    """Endless epochs over groups of images, each epoch shuffled by (seed, epoch).

    Of n images with r repeats an epoch e holds each floor((e + 1) r + k / n) - floor(e r + k / n) times, where k is the
    image's rank in a shuffle by the seed. So 0.25 shows every image once in four epochs, and the epochs before e hold
    floor(n e r) images, since the sum of floor(x + k / n) over k = 0 ... n - 1 is floor(n x) (Hermite's identity).
    """

    def __init__(self, groups: Sequence[Group], seed: int) -> None:
        self.groups = [group for group in groups if len(group.indices)]
        self.seed = seed
        self.indices = np.concatenate([np.zeros(0, np.int64), *(group.indices for group in self.groups)])
        self.rate = sum((len(group.indices) * group.repeats for group in self.groups), Fraction(0))
        self._laid: dict[int, _Epoch] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_laid": {}}  # a worker process lays its own

    def start(self, epoch: int) -> int:
        """Position at which an epoch begins."""
        return sum(
            len(group.indices) * group.repeats.numerator * epoch // group.repeats.denominator for group in self.groups
        )

    def draw(self, position: int) -> Draw:
        """What is shown at a position, from 0 on without end."""
        epoch = position * self.rate.denominator // self.rate.numerator  # never too late
        while self.start(epoch + 1) <= position:
            epoch += 1
        laid = self._layout(epoch)
        place = int(laid.order[position - laid.start])
        if laid.ends is None:
            return Draw(int(self.indices[place]), epoch, 0)
        image = int(np.searchsorted(laid.ends, place, side="right"))
        first = int(laid.ends[image - 1]) if image else 0
        return Draw(int(self.indices[image]), epoch, place - first)

    def _layout(self, epoch: int) -> _Epoch:
        if epoch not in self._laid:
            counts = [self._counts(number, epoch) for number in range(len(self.groups))]
            is_plain = all(group.repeats == 1 for group in self.groups)
            ends = None if is_plain else np.cumsum(np.concatenate(counts))
            start = self.start(epoch)
            order = permutation(self.seed, epoch, self.start(epoch + 1) - start)
            for old in sorted(self._laid)[: 1 - _KEPT]:
                del self._laid[old]
            self._laid[epoch] = _Epoch(start, order, ends)
        return self._laid[epoch]

    def _counts(self, number: int, epoch: int) -> np.ndarray:
        """How often an epoch holds each image of a group: (n,) int64."""
        group = self.groups[number]
        n, (times, parts) = len(group.indices), group.repeats.as_integer_ratio()
        # floor(e r + k / n) is floor(e r), and one more from rank ceil(n (1 - the fraction of e r)) on
        (whole, rest), (next_whole, next_rest) = divmod(epoch * times, parts), divmod((epoch + 1) * times, parts)
        counts = np.full(n, next_whole - whole, np.int64)
        if rest or next_rest:
            by_rank = permutation(derived_seed(self.seed, "repeats", number), 0, n)
            counts[by_rank[-(-(parts - next_rest) * n // parts) :]] += 1
            counts[by_rank[-(-(parts - rest) * n // parts) :]] -= 1
        return counts


@dataclass(frozen=True, slots=True)
class Place:
    """Where a position of a run lies."""

    bucket: int  # number of its stream
    position: int  # in that stream


class TrainingOrder:
    """The order of a run: of one stream, or of several whose images differ in size, a global batch from one at a time.

    Bucket b has had floor(start_b(e) / batch) batches before its epoch e. So epoch e of the run holds as many of each
    bucket as became full in it, in an order shuffled by (seed, epoch), and what is left over opens the next epoch: no
    image is lost, and none comes more often than another.
    """

    def __init__(self, streams: Sequence[Stream], seed: int, batch: int) -> None:
        self.streams = list(streams)
        self.seed = derived_seed(seed, "batches")
        self.batch = batch
        self.rate = sum((stream.rate for stream in self.streams), Fraction(0))

    def place(self, position: int) -> Place:
        """Which stream a position of the run is in, and where."""
        if len(self.streams) == 1:
            return Place(0, position)
        step, offset = divmod(position, self.batch)
        epoch = int(position // self.rate)  # never too late: every bucket may owe a part of a batch
        while sum(self._batches(epoch + 1)) <= step:
            epoch += 1
        done, after = self._batches(epoch), self._batches(epoch + 1)
        ends = np.cumsum([later - before for before, later in zip(done, after, strict=True)])
        number = int(permutation(self.seed, epoch, int(ends[-1]))[step - sum(done)])
        bucket = int(np.searchsorted(ends, number, side="right"))
        batch = after[bucket] - (int(ends[bucket]) - number)
        return Place(bucket, batch * self.batch + offset)

    def _batches(self, epoch: int) -> list[int]:
        """How many each bucket has had before an epoch."""
        return [stream.start(epoch) // self.batch for stream in self.streams]


def derived_seed(seed: int, *parts: object) -> int:
    """Another seed, for a purpose of its own."""
    return int.from_bytes(key_hash("seed", seed, *parts)[:8], "big")
