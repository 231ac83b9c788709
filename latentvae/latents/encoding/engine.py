"""The work itself: units are taken by lease, read and decoded in worker processes, encoded, and written by a thread.

Each stage works while the others do: workers decode ahead, the device has one batch to work on while the results of the
one before are put away, and a thread writes what is finished.
"""

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from latentvae.data.workers import WorkerDied, load_batches
from latentvae.errors import UserError, one_line
from latentvae.latents.encoding.encoder import LatentEncoder, RunningBatch
from latentvae.latents.encoding.launch import Launch
from latentvae.latents.encoding.opened import OpenedStore
from latentvae.latents.encoding.preprocess import Piece, UnitImages, crashed
from latentvae.latents.encoding.unit import UnitLatents, WaitingBatch
from latentvae.latents.store.files import LatentStore, UnitContent, write_unit
from latentvae.latents.store.lease import Lease
from latentvae.latents.store.plan import PlannedImage, Unit
from latentvae.latents.store.records import unit_name
from latentvae.progress import ImageProgress

logger = logging.getLogger("latentvae")

PIECE = 16  # images that a worker reads together: neighbours of an archive come in one read
MAX_WRITING = 2  # finished units that wait for the disk: up to a GB of latents each, and its copies while written
LOOK_AGAIN = 1.0  # seconds between looks at units that other processes work on


@dataclass(frozen=True)
class Claim:
    """A unit that this process works on."""

    unit: Unit
    images: list[PlannedImage]
    lease: Lease


@dataclass
class Waits:
    """Seconds that the main thread spent in each stage: the longest one is what limits the speed."""

    reading: float = 0.0  # waiting for pixels
    encoding: float = 0.0
    writing: float = 0.0  # waiting for the disk

    def __str__(self) -> str:
        total = max(self.reading + self.encoding + self.writing, 1e-9)
        shares = {"reading and decoding": self.reading, "encoding": self.encoding, "writing": self.writing}
        advice = {"reading and decoding": ": raise --num-workers", "encoding": "", "writing": ": use a faster disk"}
        slowest = max(shares, key=shares.__getitem__)
        parts = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in shares.items())
        return f"time of the encoding loop: {parts}; what limits it is {slowest}{advice[slowest]}"


@dataclass
class Work:
    """What a run did, in this process or in its actors."""

    num_units: int = 0  # committed
    num_images: int = 0  # read, with or without success
    waits: Waits = field(default_factory=Waits)


@dataclass
class UnitEncoder:
    """Encodes and commits units of an open store; the same for one process, for many, and for the actors of Ray."""

    opened: OpenedStore
    encoder: LatentEncoder
    images: UnitImages
    num_workers: int
    conditions: Mapping[str, Any]
    on_images: Callable[[int], None] = lambda count: None
    work: Work = field(default_factory=Work)

    def encode_units(self, numbers: Iterable[int]) -> bool:
        """Encode and commit those that are neither done nor worked on by others; False where there is none."""
        claims = claim_units(self.opened, numbers)
        first = next(claims, None)
        if first is None:
            return False
        self.run(itertools.chain([first], claims))
        return True

    def run(self, claims: Iterator[Claim]) -> None:
        """Encode and commit every unit claimed. UserError in one line where the disk does not take it."""
        taken: deque[Claim] = deque()  # claimed and not committed

        def pieces() -> Iterator[list[PlannedImage]]:
            for claim in claims:
                taken.append(claim)
                for start in range(0, len(claim.images), PIECE):
                    yield claim.images[start : start + PIECE]

        try:
            while True:
                try:
                    self._consume(taken, load_batches(self.images, pieces(), Piece.of, self.num_workers))
                    return
                except WorkerDied as error:
                    logger.warning("%s; going on one image at a time", one_line(error))
                for claim in list(taken):
                    self._consume(deque([claim]), self._one_by_one(claim.images))
                    taken.popleft()
        finally:
            for claim in taken:
                self.opened.leases.release(claim.lease)

    def _consume(self, taken: deque[Claim], pieces: Iterable[Piece]) -> None:
        """Encode pieces, which come in the order of the units in `taken`; a unit leaves it when it is committed."""
        unit: UnitLatents | None = None
        running: tuple[WaitingBatch, RunningBatch] | None = None
        writing: deque[Future[None]] = deque()  # of the first units in `taken`

        def settle(limit: int) -> None:
            with self._timed("writing"):
                while len(writing) > limit:
                    writing.popleft().result()
                    taken.popleft()

        def put_away() -> None:
            nonlocal running
            if running is not None:
                batch, started = running
                running = None
                with self._timed("encoding"):
                    batch.unit.take(batch, self.encoder.finish(started))

        with ThreadPoolExecutor(1, thread_name_prefix="commit") as writer:
            source = iter(pieces)
            while True:
                with self._timed("reading"):
                    try:
                        piece = next(source, None)
                    except WorkerDied:
                        settle(0)  # what is read stays
                        raise
                if piece is None:
                    break
                claim = taken[len(writing)]
                if unit is None:
                    unit = UnitLatents(len(claim.images), self.encoder.size_of)
                batches = unit.add(piece)
                if unit.is_read:
                    batches += unit.rest()
                for batch in batches:
                    with self._timed("encoding"):
                        started = self.encoder.start(batch.pixels(), batch.keys)
                    put_away()
                    running = batch, started
                self.work.num_images += len(piece.rows)
                self.on_images(len(piece.rows))
                if unit.is_read:
                    put_away()
                    settle(MAX_WRITING - 1)
                    writing.append(writer.submit(self._commit, claim, unit))
                    unit = None
            settle(0)

    def _commit(self, claim: Claim, unit: UnitLatents) -> None:
        """Runs in the writer thread."""
        opened, number = self.opened, claim.unit.number
        content = UnitContent(number, claim.unit.bucket, *unit.result())
        with explained(opened.store):
            try:
                written = write_unit(opened.store, opened.manifest, content, self.conditions, owner=claim.lease.token)
                if not claim.lease.is_held() and not opened.is_done(number):
                    written.temporary.unlink(missing_ok=True)  # our other files may be those of who took it over
                elif not claim.lease.is_held():
                    written.discard()
                elif opened.planned(number) != claim.images:
                    written.discard()  # edited meanwhile
                elif written.publish():
                    self.work.num_units += 1
                    if opened.planned(number) != claim.images:  # edited since we looked
                        opened.store.record_path(claim.unit.bucket, number).unlink(missing_ok=True)
            except FileNotFoundError:
                if claim.lease.is_held():
                    raise
                # frozen for longer than the lease, and swept away by who took it over
        opened.leases.release(claim.lease)

    def _one_by_one(self, images: list[PlannedImage]) -> Iterator[Piece]:
        """Each image alone in a worker process, so that one that kills its worker is known: an error row."""
        position = 0
        while position < len(images):
            rest = ([image] for image in images[position:])
            try:
                for piece in load_batches(self.images, rest, Piece.of, 1, prefetch=1):
                    position += 1
                    yield piece
            except WorkerDied:
                logger.warning("the process that decoded %s died", images[position].key)
                yield Piece.of([crashed(images[position])])
                position += 1

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            waits = self.work.waits
            setattr(waits, stage, getattr(waits, stage) + time.perf_counter() - began)


def encode_here(encoder: UnitEncoder, launch: Launch, progress: bool) -> None:
    """Until every unit is done, by this process or by others."""
    opened = encoder.opened
    todo = opened.todo()
    done = opened.plan.num_images - sum(opened.plan.units[number].num_images for number in todo)
    with ImageProgress("encoding", opened.plan.num_images, start=done, enabled=progress) as bar:
        encoder.on_images = lambda count: bar.update(bar.done + count)
        is_told = False
        while todo:
            mine = todo[launch.index :: launch.count]
            if encoder.encode_units(mine + [n for place, n in enumerate(todo) if place % launch.count != launch.index]):
                is_told = False
            else:
                if not is_told:
                    logger.info("%d units are being encoded by other processes: waiting for them", len(todo))
                    is_told = True
                time.sleep(LOOK_AGAIN)
                opened.plan.refresh()
            todo = opened.todo()


def claim_units(opened: OpenedStore, numbers: Iterable[int]) -> Iterator[Claim]:
    """Take the units that are neither done nor worked on by others, one by one."""
    for number in numbers:
        if opened.is_done(number):
            continue
        with explained(opened.store):
            lease = opened.leases.claim(unit_name(number))
        if lease is None:
            continue
        if opened.is_done(number):  # between looking and claiming
            opened.leases.release(lease)
            continue
        yield Claim(opened.plan.units[number], opened.planned(number), lease)


@contextmanager
def explained(store: LatentStore) -> Iterator[None]:
    """Turn what the disk says (full, read-only, no permission) into one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UserError(
            f"cannot write to {store.folder}: {reason}; what is committed stays: mend that and run the command again"
        ) from error
