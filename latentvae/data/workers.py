"""Worker processes around a dataset: batches in the order asked for, and one clear line when a worker fails."""

import atexit
import multiprocessing
import signal
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from latentvae.errors import UserError, one_line

PositionT = TypeVar("PositionT")
ExampleT = TypeVar("ExampleT")
BatchT = TypeVar("BatchT")


class WorkerDied(UserError):
    """A worker process ended without an exception: it was killed, or what it called crashed."""


class _Positions(Sampler[list[PositionT]]):
    """Hands a given iterator of positions to the DataLoader, as its batches."""

    def __init__(self, batches: Iterator[list[PositionT]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[PositionT]]:
        return self._batches


def _start_worker(worker: int) -> None:
    """Leave stop signals to the training process: a scheduler sends them to all, and the last step needs workers."""
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


_workers: "weakref.WeakSet[BaseProcess]" = weakref.WeakSet()


def _end_workers() -> None:
    """At exit, end the workers of iterators that something still holds, such as the traceback of an error.

    multiprocessing would send them the SIGTERM that they ignore, and then wait for them for ever.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler takes the end of a worker for a failure
    for worker in list(_workers):
        if worker.is_alive():
            worker.kill()


atexit.register(_end_workers)  # torch has imported multiprocessing's own exit before: the last registered runs first


def _last_line(error: UserError) -> str:
    """The message alone, of an error that a worker raised: torch puts the worker's traceback before it."""
    prefix = f"{UserError.__module__}.{UserError.__qualname__}: "
    return str(error).strip().splitlines()[-1].removeprefix(prefix)


def load_batches(
    dataset: Dataset[ExampleT],
    positions: Iterator[list[PositionT]],
    collate: Callable[[Sequence[ExampleT]], BatchT],
    num_workers: int,
    *,
    prefetch: int = 4,
) -> Generator[BatchT, None, None]:
    """collate([dataset[p] for p in list]) for each list of positions, in order, in `num_workers` processes (0: here).

    The same values for any `num_workers`. Draws nothing from torch's global random state. The workers end with the
    iterator. `positions` are whatever the dataset takes; `prefetch` lists per worker are drawn ahead. WorkerDied where
    a worker ended without an exception.
    """
    options: dict[str, Any] = {"worker_init_fn": _start_worker, "prefetch_factor": prefetch} if num_workers else {}
    loader = DataLoader(
        dataset,
        batch_sampler=_Positions(positions),
        collate_fn=collate,
        num_workers=num_workers,
        generator=torch.Generator(),  # its own, so that the run's random state does not depend on the workers
        **options,
    )
    others = set(multiprocessing.active_children())
    batches = iter(loader)
    _workers.update(set(multiprocessing.active_children()) - others)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except UserError as error:
            raise UserError(_last_line(error)) from error
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise WorkerDied(
                "a worker process that reads images died: out of memory or of shared memory (/dev/shm), or a crash "
                f"in a decoder; lower data.num_workers, or set it to 0 to see why ({one_line(error)})"
            ) from error
        yield batch
