"""Which image is in which unit: decided once, written to the store, only ever added to.

A unit is the smallest piece of work that is committed, and never changes after it is planned: batches are cut inside a
unit, so what a unit's files hold does not depend on where a run stopped. A folder's units follow the hash of the
keys, so that every unit is a fair sample of the set.
"""

import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from latentvae.data.sources import SourceEntry
from latentvae.errors import UserError, one_line
from latentvae.files import temporary_path
from latentvae.images import DecodePolicy, ImageError, probe_size
from latentvae.latents.lock import rename_new
from latentvae.latents.records import SCHEMA, Bucket

MAX_UNIT_BYTES = 10**9  # of latents: the upper end of what is downloaded, mapped or redone in one piece
PROBE_THREADS = 16  # a header read waits for the disk, mostly
PROBE_BLOCK = 10_000  # probes in flight, so that a million keys do not become a million futures at once

PLAN = pa.schema(
    [
        ("unit", pa.int32()),
        ("row", pa.int32()),  # position in the unit
        ("key", pa.string()),
        ("uri", pa.string()),
        ("width", pa.int32()),  # after EXIF orientation; null where the header was not read or not readable
        ("height", pa.int32()),
        ("bucket", pa.string()),
        ("size", pa.int64()),  # bytes
        ("mtime", pa.int64()),  # ns
    ],
    metadata={"schema_version": str(SCHEMA)},
)


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """One row of the plan; the fields are the columns of PLAN."""

    unit: int
    row: int
    key: str
    uri: str
    width: int | None
    height: int | None
    bucket: str
    size: int | None
    mtime: int | None


@dataclass(frozen=True)
class Unit:
    """The images of one unit, in their order."""

    number: int
    bucket: str
    images: list[PlannedImage]


class Plan:
    """All units of a store, from its plan files."""

    def __init__(self, images: Sequence[PlannedImage] = ()) -> None:
        self.units: list[Unit] = []
        self.keys: set[str] = set()
        for image in images:
            if image.unit == len(self.units):
                self.units.append(Unit(image.unit, image.bucket, []))
            unit = self.units[-1] if self.units else None
            if unit is None or (image.unit, image.row) != (unit.number, len(unit.images)) or image.key in self.keys:
                raise UserError(f"the plan is damaged at unit {image.unit}, row {image.row}, key {image.key!r}")
            unit.images.append(image)
            self.keys.add(image.key)

    @property
    def num_images(self) -> int:
        """In all units."""
        return len(self.keys)

    def images(self) -> Iterator[PlannedImage]:
        """Every row, unit by unit."""
        for unit in self.units:
            yield from unit.images


def plan_images(
    entries: Sequence[SourceEntry], *, first_unit: int, unit_images: int, bytes_per_row: int, bucket: Bucket,
    policy: DecodePolicy,
) -> list[PlannedImage]:  # fmt: skip
    """Cut entries into units of at most `unit_images` images and 1 GB of latents, in hash order of their keys."""
    per_unit = max(1, min(unit_images, MAX_UNIT_BYTES // max(bytes_per_row, 1)))
    ordered = sorted(entries, key=lambda entry: hashlib.sha256(entry.key.encode()).digest())
    sizes = _probe(ordered, policy)
    return [
        PlannedImage(
            unit=first_unit + position // per_unit,
            row=position % per_unit,
            key=entry.key,
            uri=entry.uri,
            width=size[0] if size else None,
            height=size[1] if size else None,
            bucket=bucket.name,
            size=entry.num_bytes,
            mtime=entry.mtime_ns,
        )
        for position, (entry, size) in enumerate(zip(ordered, sizes, strict=True))
    ]


def _probe(entries: Sequence[SourceEntry], policy: DecodePolicy) -> list[tuple[int, int] | None]:
    """(width, height) from the headers of files; None for what is no file, or has no readable header."""

    def size(entry: SourceEntry) -> tuple[int, int] | None:
        if entry.num_bytes is None:
            return None
        try:
            return probe_size(entry.uri, policy)
        except (ImageError, OSError):
            return None  # encoding meets it again, and records the reason

    sizes: list[tuple[int, int] | None] = []
    if all(entry.num_bytes is None for entry in entries):
        return [None] * len(entries)
    with ThreadPoolExecutor(PROBE_THREADS) as pool:
        for start in range(0, len(entries), PROBE_BLOCK):
            sizes += pool.map(size, entries[start : start + PROBE_BLOCK])
    return sizes


def publish(folder: Path, images: Sequence[PlannedImage]) -> Path:
    """Write the next plan file, whole or not at all; a plan file that exists is never replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"plan-{len(plan_files(folder)):04d}.parquet"
    temporary = temporary_path(path)
    try:
        columns = [pa.array([getattr(image, column.name) for image in images], column.type) for column in PLAN]
        pq.write_table(pa.Table.from_arrays(columns, schema=PLAN), temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if not rename_new(temporary, path):
            raise UserError(f"{path} was written by another process meanwhile: start again")
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_plan(folder: Path) -> Plan:
    """All plan files in order; an empty plan where there is none. UserError where one is damaged."""
    images: list[PlannedImage] = []
    for path in plan_files(folder):
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"cannot read the plan {path}: {one_line(error)}") from error
        if not table.schema.equals(PLAN):
            raise UserError(f"the plan {path} does not have the columns of schema {SCHEMA}")
        columns = [table[name].to_pylist() for name in PLAN.names]
        images += itertools.starmap(PlannedImage, zip(*columns, strict=True))
    return Plan(images)


def plan_files(folder: Path) -> list[Path]:
    """In order."""
    return sorted(folder.glob("plan-*.parquet"))
