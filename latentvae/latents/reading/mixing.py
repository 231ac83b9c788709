"""Several stores as one: concatenated, or drawn from by weights."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
from torch.utils.data import Dataset

from latentvae.errors import UserError
from latentvae.latents.reading.dataset import LatentDataset
from latentvae.latents.reading.draws import shuffled
from latentvae.latents.reading.items import LatentItem, ReadOptions
from latentvae.latents.reading.readable import ReadableStore

D = TypeVar("D")


class MixedLatentDataset(Dataset[LatentItem]):
    """Map-style over the items of several datasets, one after the other.

    With weights, an epoch of `BucketBatchSampler` has as many draws as there are items, and each dataset's share of
    them is its weight over the sum of the weights. A dataset goes through all its items in a new order before it
    repeats one, across epochs too. Without weights every item comes once per epoch.

    Args:
        datasets: each with its weight, or all without. Their items must have the same fields and number of channels.
    """

    def __init__(self, datasets: Sequence[LatentDataset | tuple[LatentDataset, float]]) -> None:
        self.datasets, weights = with_weights(datasets)
        require_alike(self.datasets)
        self._starts = np.cumsum([0, *map(len, self.datasets)])
        self.draws = shares([len(dataset) for dataset in self.datasets], weights)
        self.latent_shapes = sorted({shape for dataset in self.datasets for shape in dataset.latent_shapes})
        numbers = {shape: number for number, shape in enumerate(self.latent_shapes)}
        self.buckets = np.concatenate(
            [np.array([numbers[shape] for shape in each.latent_shapes])[each.buckets] for each in self.datasets]
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def keys(self) -> list[str]:
        """The key of every item, in order; two datasets may have the same."""
        return [key for dataset in self.datasets for key in dataset.keys]

    def set_epoch(self, epoch: int) -> None:
        """Of every dataset."""
        for dataset in self.datasets:
            dataset.set_epoch(epoch)

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        """The draws of one epoch, (n,) int64: each dataset's next ones, in an order decided by seed, epoch and keys."""
        parts = []
        for number, (dataset, draws) in enumerate(zip(self.datasets, self.draws, strict=True)):
            first, drawn = epoch * draws, []
            while draws:  # pass after pass over the dataset, as far as this epoch's share goes
                turn, skipped = divmod(first, len(dataset))
                drawn.append(dataset.epoch_order(seed, turn)[skipped : skipped + draws])
                first += len(drawn[-1])
                draws -= len(drawn[-1])
            parts.append(np.concatenate([np.zeros(0, np.int64), *drawn]) + self._starts[number])
        together = np.concatenate(parts)
        return together[shuffled(np.arange(len(together), dtype=np.uint64), "mixed", seed, epoch)]

    def __getitem__(self, index: int) -> LatentItem:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[LatentItem]:
        """A batch of items, each from its dataset."""
        places = np.asarray(indices, dtype=np.int64)
        if len(places) and not (-len(self) <= places.min() and places.max() < len(self)):
            raise IndexError(f"index out of range for {len(self)} latents")
        places = places % len(self)
        of_dataset = np.searchsorted(self._starts, places, side="right") - 1
        items: list[LatentItem | None] = [None] * len(places)
        for number in np.unique(of_dataset).tolist():
            here = np.flatnonzero(of_dataset == number)
            found = self.datasets[number].__getitems__((places[here] - self._starts[number]).tolist())
            for place, item in zip(here.tolist(), found, strict=True):
                items[place] = item
        return [item for item in items if item is not None]

    def close(self) -> None:
        """Release the memory maps."""
        for dataset in self.datasets:
            dataset.close()


class Mixable(Protocol):
    """What datasets must agree in to be mixed."""

    options: ReadOptions

    @property
    def store(self) -> ReadableStore: ...
    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]: ...
    @property
    def item_fields(self) -> list[str]: ...


def require_alike(datasets: Sequence[Mixable]) -> None:
    """UserError where the items of several datasets could not be in one batch."""
    first = datasets[0]
    for other in datasets[1:]:
        where = f"{first.store.name} and {other.store.name} cannot be mixed"
        channels = first.latent_shapes[0][0], other.latent_shapes[0][0]
        if channels[0] != channels[1]:
            raise UserError(f"{where}: their latents have {channels[0]} and {channels[1]} channels")
        if first.options.normalize != other.options.normalize:
            raise UserError(f"{where}: pass the same normalize for both")
        differing = set(first.item_fields) ^ set(other.item_fields)
        if differing:
            raise UserError(f"{where}: only one has {', '.join(sorted(differing))}; pass the same options for both")


def with_weights(entries: Sequence[D | tuple[D, float]]) -> tuple[list[D], list[float]]:
    """Datasets and their weights, none where there are none. UserError for weights that are no shares."""
    if not entries:
        raise UserError("no dataset was given to mix: give at least one")
    datasets = [entry[0] if isinstance(entry, tuple) else entry for entry in entries]
    weights = [float(entry[1]) for entry in entries if isinstance(entry, tuple)]
    if weights and len(weights) != len(entries):
        raise UserError(f"{len(weights)} of {len(entries)} datasets have a weight: give all of them one, or none")
    if any(not 0 <= weight < float("inf") for weight in weights) or (weights and not sum(weights)):
        raise UserError(f"weights are {', '.join(map(str, weights))}: they must be 0 or more, and not all 0")
    return datasets, weights


def shares(counts: Sequence[int], weights: Sequence[float]) -> list[int]:
    """How many of sum(counts) draws each gets: in proportion to the weights, or its count where there are none."""
    if not weights:
        return list(counts)
    exact = np.array(weights, np.float64) / sum(weights) * sum(counts)
    whole = np.floor(exact).astype(np.int64)
    largest = np.argsort(whole - exact, kind="stable")[: sum(counts) - whole.sum()]
    whole[largest] += 1  # the largest remainders
    return whole.tolist()
