"""Encoding on a Ray cluster: unit numbers go to actors, which read, encode and commit the units themselves.

The driver opens the store, hands out numbers and looks at what is committed; pixels and latents never pass through Ray.
An actor that is lost is replaced. Its units go back into the queue, and are free once its leases are over: at once on
its own host, elsewhere when they expire.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any

import torch

from latentvae.errors import UserError
from latentvae.latents.encoding.engine import LOOK_AGAIN, Waits, Work
from latentvae.latents.encoding.opened import OpenedStore
from latentvae.latents.encoding.ray_actors import ActorLost, Crew, Job, Places, connected, import_ray
from latentvae.progress import ImageProgress

logger = logging.getLogger("latentvae")

PORTION = 4  # units that an actor gets at a time: between portions it waits for its first images
MAX_LOSSES = 3  # actors in a row that die on the same unit, or as they start
PATIENCE = 30.0  # seconds without a free place in the cluster after which that is said


def encode_on_ray(job: Job, opened: OpenedStore, work: Work, progress: bool) -> None:
    """Until every unit is done; adds to `work` what the actors did.

    UserError in one line: Ray is not installed or not there, an actor's own one, or actors that die again and again.
    """
    if job.launch.count > 1:
        raise UserError(f"the engine ray starts its own processes, and {job.launch.count} were started: start one")
    ray = import_ray()
    if not opened.todo():
        return
    with connected(ray, job.config.ray_address):
        largest = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=1)
        places = Places.of(ray.cluster_resources(), largest, job.config, torch.get_num_threads())
        if job.config.batch_size == "auto" and places.num_gpus and job.launch.device.type == "cpu":
            raise UserError("batch_size auto is measured where the command runs, which has no GPU: give a number")
        logger.info(
            "up to %d actors of Ray, each with %d CPUs and %d GPUs", places.count, places.num_cpus, places.num_gpus
        )
        crew = Crew(ray, job, places)
        try:
            Dispatch(opened, crew, work).run(progress)
        finally:
            crew.dismiss()


class Dispatch:
    """Which units are still to be given out, which are in work, and how often one has cost an actor."""

    def __init__(self, opened: OpenedStore, crew: Crew, work: Work) -> None:
        self.opened, self.crew, self.work = opened, crew, work
        self.queue: deque[int] = deque()
        self.losses: Counter[int] = Counter()
        self.losses_at_start = 0
        self._is_environment_noted = False

    def run(self, progress: bool) -> None:
        """Until every unit is done."""
        opened = self.opened
        total = opened.plan.num_images
        todo = opened.todo()
        self.queue.extend(todo)
        began = time.monotonic()
        is_patient = True
        with ImageProgress("encoding", total, start=total - self._images(todo), enabled=progress) as bar:
            while todo or self.crew.is_working:
                while self.queue and self.crew.idle:
                    self.crew.give(self._portion())
                if self.crew.busy:
                    for call in self.crew.finished(LOOK_AGAIN):
                        self._settle(call)
                if is_patient and not self.crew.is_working and not self.crew.idle:
                    is_patient = time.monotonic() - began < PATIENCE
                    if not is_patient:
                        logger.warning("no actor has started yet: the cluster has no free place, or starts one slowly")
                todo = [number for number in todo if not opened.is_done(number)]
                bar.update(total - self._images(todo))
                if todo and not self.queue and not self.crew.is_working:
                    time.sleep(LOOK_AGAIN)  # others work on what is left, or its leases are those of lost actors
                    opened.plan.refresh()
                    todo = opened.todo()
                    total = opened.plan.num_images
                    self.queue.extend(todo)

    def _images(self, units: Iterable[int]) -> int:
        return sum(self.opened.plan.units[number].num_images for number in units)

    def _portion(self) -> list[int]:
        """The next units for one actor: fewer towards the end, and alone what an actor was lost with."""
        size = max(1, min(PORTION, len(self.queue) // (2 * self.crew.places.count)))
        numbers = [self.queue.popleft()]
        while self.queue and len(numbers) < size and not self.losses[numbers[0]] and not self.losses[self.queue[0]]:
            numbers.append(self.queue.popleft())
        return numbers

    def _settle(self, call: Any) -> None:
        is_start = call in self.crew.starting
        try:
            numbers, value = self.crew.result(call)
        except ActorLost as lost:
            self._replace(lost)
            return
        if is_start:
            self.losses_at_start = 0
            if not self._is_environment_noted:
                self._is_environment_noted = True
                self.opened.note_environment(value)
            return
        for number in numbers:
            self.losses.pop(number, None)
        self._add(value)

    def _add(self, done: Work) -> None:
        self.work.num_units += done.num_units
        self.work.num_images += done.num_images
        mine, theirs = self.work.waits, done.waits
        self.work.waits = Waits(
            mine.reading + theirs.reading, mine.encoding + theirs.encoding, mine.writing + theirs.writing
        )

    def _replace(self, lost: ActorLost) -> None:
        """Another actor for a lost one, and its units back into the queue."""
        done = [number for number in lost.numbers if self.opened.is_done(number)]
        self._add(Work(len(done), self._images(done)))
        left = [number for number in lost.numbers if number not in done]
        self.losses.update(left)
        self.losses_at_start += not lost.numbers
        logger.warning("an actor of Ray was lost (%s); another takes its place", lost)
        if len(left) == 1 and self.losses[left[0]] >= MAX_LOSSES:
            key = self.opened.planned(left[0])[0].key
            raise UserError(
                f"{MAX_LOSSES} actors of Ray died while encoding unit {left[0]} (from {key} on): see Ray's logs, and "
                "give --num-workers 1 or more, so that an image that kills its reader becomes an error row"
            )
        if self.losses_at_start >= MAX_LOSSES:
            raise UserError(f"actors of Ray die as they start ({lost}): see Ray's logs")
        self.queue.extendleft(reversed(left))
        self.crew.hire()
