"""Batches of one latent size each, shuffled by key, the same number for every rank, resumable."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch.utils.data import Sampler

from latentvae.errors import UserError
from latentvae.latents.reading.draws import key_words, shuffled


class Bucketed(Protocol):
    """What the sampler needs of a dataset: LatentDataset, MixedLatentDataset."""

    buckets: np.ndarray  # (n,) int64: items of equal number have latents of equal shape

    def __len__(self) -> int: ...

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        """Indices of one pass, in an order decided by seed, epoch and keys."""

    def set_epoch(self, epoch: int) -> None:
        """Other noise and mirroring."""


class BucketBatchSampler(Sampler[list[int]]):
    """Give it to a DataLoader as `batch_sampler`; every batch holds items of one latent shape.

    In each step all ranks get batches of the same bucket and the same size, and all get the same number of batches. A
    bucket's last batches are smaller: its rest is dealt out evenly, with fewer than `num_replicas` of its items
    repeated, or left out with `drop_last`.

    It is rank-aware itself, so the DataLoader must not be divided again: leave it out of `accelerator.prepare`. Or pass
    `rank="all"`, prepare it with `DataLoaderConfiguration(even_batches=False)`, and call `set_epoch` of the prepared
    DataLoader instead of this one's: Accelerate then deals the batches out, and every rank gets what it would have got.

    Args:
        dataset: a LatentDataset or MixedLatentDataset; of the latter an epoch draws by its weights.
        batch_size: items per batch and rank.
        seed: of the order, which depends on seed, epoch and keys, not on the items' positions.
        shuffle: False: the dataset's order inside each bucket, buckets one after the other.
        drop_last: leave out what does not fill a batch on every rank, so that all batches are full.
        rank: this process among `num_replicas`; "all": the batches of all ranks in turn. None: of torch.distributed
            where it is initialised, else of the variables RANK and WORLD_SIZE, else 0 of 1.
        num_replicas: see rank.
    """

    def __init__(
        self,
        dataset: Bucketed,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int | Literal["all"] | None = None,
        num_replicas: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}: it must be at least 1")
        self.dataset, self.seed, self.shuffle = dataset, seed, shuffle
        # not named batch_size and drop_last: Accelerate would take the smaller batches for the end of the pass
        self.items_per_batch, self.is_dropping = batch_size, drop_last
        world = process_place(None if rank == "all" else rank, num_replicas)
        self.rank = "all" if rank == "all" else world[0]
        self.num_replicas = world[1]
        self.epoch = 0
        self._start = (0, 0)  # epoch, batches of it that are not to come again
        self._given = (0, 0)  # epoch, batches of it that were given out
        self._kept: tuple[int, list[np.ndarray]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Before each pass: another order, and the dataset's `set_epoch`."""
        self.epoch = epoch
        self.dataset.set_epoch(epoch)

    @property
    def sampler(self) -> "BucketBatchSampler":
        """Where Accelerate's `set_epoch` looks for a batch sampler's own."""
        return self

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return len(self._batches(self.epoch))

    def __iter__(self) -> Iterator[list[int]]:
        epoch, batches = self.epoch, self._batches(self.epoch)
        start = self._start[1] if self._start[0] == epoch else 0
        self._given = (epoch, start)
        return self._from(start, epoch, batches)

    def _from(self, start: int, epoch: int, batches: list[np.ndarray]) -> Iterator[list[int]]:
        for number in range(start, len(batches)):
            self._given = (epoch, number + 1)
            yield batches[number].tolist()

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """Where this pass stands.

        batches: how many of this epoch were trained on (with `rank="all"`, by all ranks together). None: how many were
            given out, which is the same but for a DataLoader with workers: it asks for batches ahead of time.
        """
        epoch, given = self._given if self._given[0] == self.epoch else (self.epoch, 0)
        return {"epoch": epoch, "batches": given if batches is None else batches, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue a pass: sets the epoch, whose first `batches` are then left out. UserError for another order."""
        require_same_pass(state, self._identity(), "sampler")
        self.set_epoch(int(state["epoch"]))
        self._start = self._given = (self.epoch, int(state["batches"]))

    def _identity(self) -> dict[str, Any]:
        """What decides the batches of an epoch."""
        digest = hashlib.sha256(self._order(0).tobytes() + self.dataset.buckets.tobytes()).hexdigest()
        return {
            "batch_size": self.items_per_batch,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "drop_last": self.is_dropping,
            "num_replicas": self.num_replicas,
            "all_ranks": self.rank == "all",
            "items": digest[:16],
        }

    def _order(self, epoch: int) -> np.ndarray:
        return self.dataset.epoch_order(self.seed, epoch) if self.shuffle else np.arange(len(self.dataset))

    def _cuts(self, count: int) -> list[tuple[int, int]]:
        """(first item, items per rank) of each step over one bucket of `count` items."""
        together = self.items_per_batch * self.num_replicas
        cuts = [(start, self.items_per_batch) for start in range(0, count - together + 1, together)]
        rest = count % together
        if rest and not self.is_dropping:
            cuts.append((count - rest, -(-rest // self.num_replicas)))
        return cuts

    def _batches(self, epoch: int) -> list[np.ndarray]:
        """Of this rank, or of all; those of the last epoch that was asked for are kept."""
        if self._kept is None or self._kept[0] != epoch:
            steps = self._steps(self._order(epoch))
            if not steps:
                raise UserError(
                    f"drop_last leaves no batch: no bucket holds {self.items_per_batch} x {self.num_replicas} items "
                    "(batch_size x num_replicas): lower batch_size, or pass drop_last=False"
                )
            if self.shuffle:
                words = key_words([str(number) for number in range(len(steps))])
                steps = [steps[number] for number in shuffled(words, "batches", self.seed, epoch).tolist()]
            parts = [np.split(items, self.num_replicas) for items in steps]
            ranks = range(self.num_replicas) if isinstance(self.rank, str) else [self.rank]
            self._kept = epoch, [part[rank] for part in parts for rank in ranks]
        return self._kept[1]

    def _steps(self, order: np.ndarray) -> list[np.ndarray]:
        """Items that all ranks take together, bucket by bucket; their number is a multiple of num_replicas."""
        of_order = self.dataset.buckets[order]
        steps = []
        for bucket in np.unique(of_order).tolist():
            items = order[of_order == bucket]
            for first, size in self._cuts(len(items)):
                together = size * self.num_replicas
                steps.append(np.resize(items[first : first + together], together))  # it repeats from the beginning
        return steps


def require_same_pass(state: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """UserError where a state does not belong to a pass of the settings and items `expected`."""
    for name, value in expected.items():
        if state.get(name) != value:
            raise UserError(
                f"the {what}'s state has {name} {state.get(name)} and this {what} {value}: a pass can only be "
                "continued with the settings and the items it was begun with"
            )


def process_place(rank: int | None, num_replicas: int | None) -> tuple[int, int]:
    """(rank, number of processes): as given, else of torch.distributed, else of the launcher's variables."""
    if (rank is None) != (num_replicas is None) and num_replicas is None:
        raise UserError(f"rank is {rank} and num_replicas is not given: give both or neither")
    if num_replicas is None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, num_replicas = torch.distributed.get_rank(), torch.distributed.get_world_size()
        else:
            rank, num_replicas = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    rank = 0 if rank is None else rank
    if not 0 <= rank < num_replicas:
        raise UserError(f"rank is {rank}: it must be 0 to {num_replicas - 1}, for num_replicas is {num_replicas}")
    return rank, num_replicas
