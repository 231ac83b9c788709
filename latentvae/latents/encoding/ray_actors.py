"""The actors of a Ray cluster that encode units: how many there are, their start, their work and their loss."""

import logging
import os
import platform
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol, Self

import torch

from latentvae.errors import UserError, one_line
from latentvae.latents.encoding.engine import UnitEncoder, Work
from latentvae.latents.encoding.launch import Launch
from latentvae.latents.encoding.settings import EncodeConfig
from latentvae.latents.store.files import LatentStore
from latentvae.latents.store.lease import Leases

CONNECT_SECONDS = 10.0  # to see whether anything listens at an address


class Job(Protocol):
    """What the driver prepared: `EncodeJob`."""

    store: LatentStore
    config: EncodeConfig
    launch: Launch

    def packed(self) -> Self:
        """As it is sent to an actor."""
        ...

    def join(self, leases: Leases, launch: Launch) -> UnitEncoder:
        """In the actor."""
        ...


class UnitActor:
    """Holds a model and encodes the units whose numbers it gets. One call at a time."""

    def __init__(self, folder: str, threads: int) -> None:
        """folder: where the driver runs, for relative paths; threads: the driver's, since they change the last bits."""
        self.folder, self.threads = folder, threads
        self.encoder: UnitEncoder | None = None

    def start(self, job: Job) -> Mapping[str, Any]:
        """Join the store that the driver opened; returns what decides the last bits here."""
        try:
            os.chdir(self.folder)
        except OSError as error:
            raise UserError(
                f"the folder {self.folder} is not there on {platform.node()}: the nodes of the Ray cluster must "
                "see the file system of the driver under the same paths"
            ) from error
        torch.set_num_threads(self.threads)
        leases = Leases(job.store.leases, job.config.lease_seconds)
        self.encoder = job.join(leases, Launch.current(job.config.device))
        self.encoder.encoder.vae.module.eval()
        return self.encoder.conditions

    def encode(self, numbers: list[int]) -> Work:
        """Those that are neither done nor worked on by others; returns what was done."""
        assert self.encoder is not None
        self.encoder.work = Work()
        self.encoder.encode_units(numbers)
        return self.encoder.work


@dataclass(frozen=True)
class Places:
    """How many actors a cluster takes, and what each asks for."""

    count: int
    num_cpus: int
    num_gpus: int

    @classmethod
    def of(cls, resources: Mapping[str, float], largest_node: int, config: EncodeConfig, threads: int) -> Self:
        """resources: of the whole cluster, by Ray's names; `largest_node`: CPUs of the one that has most."""
        cpus = max(1, int(resources.get("CPU", 1)))
        gpus = 0 if config.device == "cpu" else int(resources.get("GPU", 0))
        if gpus:
            readers = max(1, min(config.num_workers, cpus // gpus))
            return cls(config.ray_actors or gpus, readers, 1)
        per_actor = max(1, min(threads, largest_node))
        return cls(config.ray_actors or max(1, cpus // per_actor), per_actor, 0)


def import_ray() -> ModuleType:
    """UserError where it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise UserError("the engine ray needs Ray: pip install latentvae[ray]") from error
    return ray


@contextmanager
def connected(ray: ModuleType, address: str | None) -> Iterator[None]:
    """To the Ray that this process uses already, else to the one at `address`; UserError where there is none."""
    if ray.is_initialized():
        yield
        return
    try:
        host, _, port = (address or "").removeprefix("ray://").rpartition(":")
        if host and port.isdigit():  # Ray itself tries for a minute, and then ends the process
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        ray.init(address=address, logging_level=logging.WARNING)
    except (ConnectionError, ValueError, OSError, RuntimeError) as error:
        raise UserError(f"no Ray cluster at {address or 'this machine'}: {one_line(error)[:200]}") from error
    try:
        yield
    finally:
        ray.shutdown()


@dataclass
class Crew:
    """The actors, and the call that each is busy with."""

    ray: Any
    job: Job
    places: Places
    busy: dict[Any, tuple[Any, list[int]]] = field(default_factory=dict)  # call -> (actor, its units)
    starting: set[Any] = field(default_factory=set)  # calls of actors that may still wait for a place
    idle: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        places = self.places
        options = {"num_cpus": places.num_cpus, "num_gpus": places.num_gpus, "max_restarts": 0, "max_task_retries": 0}
        self._class = self.ray.remote(**options)(UnitActor)
        self._packed = self.ray.put(self.job.packed())
        for _ in range(places.count):
            self.hire()

    @property
    def is_working(self) -> bool:
        """Whether an actor is encoding."""
        return len(self.busy) > len(self.starting)

    def hire(self) -> None:
        """One more actor; it gets work when it has found a place and has started."""
        actor = self._class.remote(os.getcwd(), torch.get_num_threads())
        call = actor.start.remote(self._packed)
        self.busy[call] = actor, []
        self.starting.add(call)

    def give(self, numbers: list[int]) -> None:
        """Let an idle actor encode units."""
        actor = self.idle.pop()
        self.busy[actor.encode.remote(numbers)] = actor, numbers

    def finished(self, seconds: float) -> list[Any]:
        """The calls that have ended, waiting for at most that long for the first."""
        ended, _ = self.ray.wait(list(self.busy), num_returns=1, timeout=seconds)
        return list(ended)

    def result(self, call: Any) -> tuple[list[int], Any]:
        """(units, what the actor gave back), or ActorLost with the units; what failed inside is raised."""
        actor, numbers = self.busy.pop(call)
        self.starting.discard(call)
        lost = self.ray.exceptions
        try:
            value = self.ray.get(call)
        except (lost.RayActorError, lost.WorkerCrashedError, lost.OutOfMemoryError, lost.NodeDiedError) as error:
            with suppress(Exception):
                self.ray.kill(actor)  # one that only could not be reached must not go on
            raise ActorLost(numbers, one_line(error)[:200]) from error
        except lost.RayTaskError as error:
            self.idle.append(actor)  # `dismiss` must find it: what failed may be kept, and with it the actor's place
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from error
            raise
        self.idle.append(actor)
        return numbers, value

    def dismiss(self) -> None:
        """End all actors; what one was working on is free at once, or when its lease is over."""
        for actor in [*self.idle, *(actor for actor, _ in self.busy.values())]:
            with suppress(Exception):
                self.ray.kill(actor)


class ActorLost(Exception):
    """An actor died, or its node did."""

    def __init__(self, numbers: list[int], reason: str) -> None:
        super().__init__(reason)
        self.numbers = numbers
