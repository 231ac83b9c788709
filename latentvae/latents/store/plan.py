"""Which image is in which unit: decided once, written to the store, only ever added to.

A unit is the smallest piece of work that is committed, and its images never change: batches are cut inside a unit, so
what a unit's files hold does not depend on where a run stopped. The units of a folder follow the hash of the keys, so
that each is a fair sample of the set; those of archives follow the archive, so that it is read once and in sequence.

A plan file holds either new units or, for images that moved or were edited, rows that take the place of older ones.
"""

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentvae.data.entries import EntryTable, SourceEntry
from latentvae.errors import UserError, one_line
from latentvae.files import fsync, rename_new, temporary_path
from latentvae.keyed import key_hash
from latentvae.latents.store.records import SCHEMA

MAX_UNIT_BYTES = 10**9  # of latents: the upper end of what is downloaded, mapped or redone in one piece
GROUP_ROWS = 65_536  # of a row group of a plan file, which holds whole units: what is read to find one of them

PLAN = pa.schema(
    [
        ("unit", pa.int32()),
        ("row", pa.int32()),  # position in the unit
        ("key", pa.string()),
        ("uri", pa.string()),
        ("offset", pa.int64()),  # in the file at `uri`; null where that is the image
        ("width", pa.int32()),  # after EXIF orientation; null where the header was not read or not readable
        ("height", pa.int32()),
        ("bucket", pa.string()),  # home of the unit
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
    offset: int | None
    width: int | None
    height: int | None
    bucket: str
    size: int | None
    mtime: int | None

    @property
    def entry(self) -> SourceEntry:
        """As the source takes it."""
        return SourceEntry(key=self.key, uri=self.uri, offset=self.offset, num_bytes=self.size, mtime_ns=self.mtime)


@dataclass(frozen=True, slots=True)
class Unit:
    """Where the images of one unit are planned."""

    number: int
    bucket: str
    num_images: int
    file: int
    group: int  # row group of that file
    start: int  # row of that group


class Plan:
    """All units of a store. The rows themselves are read when asked for: a process holds a few row groups of them."""

    def __init__(self, folder: Path) -> None:
        """The plan files in `folder`; an empty plan where there is none. UserError where one is damaged."""
        self.folder = folder
        self.files: list[Path] = []
        self.units: list[Unit] = []
        self.num_images = 0
        self.amended: dict[int, dict[int, PlannedImage]] = {}  # unit -> row -> what takes its place
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()  # (file, row group) last read
        self.refresh()

    def refresh(self) -> set[int]:
        """Read plan files that have come since; returns the units that they amend."""
        amended: set[int] = set()
        for path in plan_files(self.folder)[len(self.files) :]:
            with _explained(path):
                file = pq.ParquetFile(path)
                if not file.schema_arrow.equals(PLAN):
                    raise UserError(f"the plan {path} does not have the columns of schema {SCHEMA}")
                first = file.read_row_group(0, ["unit"])["unit"][0].as_py() if file.num_row_groups else 0
                if first < len(self.units):
                    images = _planned(file.read())
                    amended.update(image.unit for image in images)
                    self._amend(path, images)
                else:
                    self._add_units(path, file)
            self.files.append(path)
        return amended

    def _amend(self, path: Path, images: Sequence[PlannedImage]) -> None:
        for image in images:
            if image.unit >= len(self.units) or image.row >= self.units[image.unit].num_images:
                raise UserError(f"the plan {path} is damaged: it amends unit {image.unit}, row {image.row}")
            self.amended.setdefault(image.unit, {})[image.row] = image

    def _add_units(self, path: Path, file: pq.ParquetFile) -> None:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, ["unit", "row", "bucket"])
            units, rows = table["unit"].to_numpy(), table["row"].to_numpy()
            starts = np.flatnonzero(np.r_[True, units[1:] != units[:-1]])
            counts = np.diff(np.r_[starts, len(units)])
            expected = np.arange(len(starts)) + len(self.units)
            positions = np.arange(len(units)) - np.repeat(starts, counts)
            if not (np.array_equal(units[starts], expected) and np.array_equal(rows, positions)):
                raise UserError(
                    f"the plan {path} is damaged: its units or rows are not 0, 1, 2, ... in row group {group}"
                )
            homes = table["bucket"].take(pa.array(starts)).to_pylist()
            for start, count, home in zip(starts.tolist(), counts.tolist(), homes, strict=True):
                self.units.append(Unit(len(self.units), home, count, len(self.files), group, start))
            self.num_images += len(units)

    def images(self, unit: int) -> list[PlannedImage]:
        """The images of a unit, in their order."""
        place = self.units[unit]
        images = _planned(self._row_group(place).slice(place.start, place.num_images))
        for row, image in self.amended.get(unit, {}).items():
            images[row] = image
        return images

    def _row_group(self, place: Unit) -> pa.Table:
        table = self._groups.pop((place.file, place.group), None)
        if table is None:
            with _explained(self.files[place.file]):
                table = pq.ParquetFile(self.files[place.file]).read_row_group(place.group)
        self._groups[place.file, place.group] = table
        if len(self._groups) > 2:
            self._groups.popitem(last=False)
        return table

    def columns(self, names: Sequence[str]) -> pa.Table:
        """Columns of all planned images, in the order of units and rows, newest rows in the place of older ones."""
        tables = []
        for number in sorted({unit.file for unit in self.units}):
            with _explained(self.files[number]):
                tables.append(pq.read_table(self.files[number], columns=list(names)))
        table = pa.concat_tables(tables) if tables else PLAN.empty_table().select(list(names))
        if not self.amended:
            return table
        starts = np.cumsum([0, *(unit.num_images for unit in self.units)])
        images = [image for rows in self.amended.values() for image in rows.values()]
        places = np.array([starts[image.unit] + image.row for image in images])
        order = np.argsort(places)
        mask = np.zeros(len(table), bool)
        mask[places] = True
        for index, name in enumerate(names):
            values = pa.array([getattr(images[place], name) for place in order], table[name].type)
            table = table.set_column(index, table.schema.field(name), _replaced(table[name], mask, values))
        return table


def _replaced(column: pa.ChunkedArray, mask: np.ndarray, values: pa.Array) -> pa.ChunkedArray:
    """`column` with `values` where the mask is true; chunk by chunk, for a whole one may exceed 2 GB of strings."""
    before = np.r_[0, np.cumsum(mask)]  # of `values`, before each row
    chunks, start = [], 0
    for chunk in column.chunks:
        stop = start + len(chunk)
        part = values[before[start] : before[stop]]
        chunks.append(pc.replace_with_mask(chunk, mask[start:stop], part) if len(part) else chunk)
        start = stop
    return pa.chunked_array(chunks, column.type)


def _planned(table: pa.Table) -> list[PlannedImage]:
    columns = [table[name].to_pylist() for name in PLAN.names]
    return [PlannedImage(*values) for values in zip(*columns, strict=True)]


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what a damaged plan file raises into one line."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read the plan {path}: {one_line(error)}") from error


def hash_order(table: EntryTable) -> np.ndarray:
    """Indices of the entries in the order of their keys' hashes, (N,) int64."""
    first = np.fromiter((key_hash(entry.key)[:8] for entry in table), dtype="S8", count=len(table))
    return np.argsort(first.view(">u8"), kind="stable")


def cut_units(
    homes: np.ndarray, capacities: dict[str, int], first_unit: int, *, sequential: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut images, in their order, into units of one home and of at most its capacity.

    homes (N,) of strings => order (N,), unit (N,), row (N,): `order` indexes the images as the units hold them. In
    sequence a unit ends where the home changes, else the images of one home are gathered first.
    """
    names, codes = np.unique(homes, return_inverse=True)
    order = np.arange(len(homes)) if sequential else np.argsort(codes, kind="stable")
    codes = codes[order]
    run_starts = np.flatnonzero(np.r_[True, codes[1:] != codes[:-1]]) if len(codes) else np.zeros(0, np.int64)
    run_of = np.searchsorted(run_starts, np.arange(len(codes)), side="right") - 1
    position = np.arange(len(codes)) - run_starts[run_of] if len(codes) else np.zeros(0, np.int64)
    capacity = np.array([capacities[str(name)] for name in names], np.int64)[codes] if len(codes) else position
    row = position % capacity if len(codes) else position
    unit = first_unit + np.cumsum(row == 0) - 1
    return order, unit, row


def publish(folder: Path, table: pa.Table, number: int | None = None) -> Path:
    """Write the next plan file, whole or not at all; a plan file that exists is never replaced.

    table: rows of PLAN. Row groups end between units. `number`: of the file, by what the writer knows of the plan;
    UserError where another process has written it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"plan-{len(plan_files(folder)) if number is None else number:04d}.parquet"
    temporary = temporary_path(path)
    units = table["unit"].to_numpy()
    ends = [*np.flatnonzero(units[1:] != units[:-1]) + 1, len(table)]
    try:
        with pq.ParquetWriter(temporary, PLAN) as writer:
            start = 0
            for end, following in zip(ends, [*ends[1:], None], strict=True):
                if following is None or following - start > GROUP_ROWS:
                    writer.write_table(table.slice(start, end - start), row_group_size=end - start)
                    start = end
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if not rename_new(temporary, path):
            raise UserError(f"{path} was written by another process meanwhile: start again")
        fsync(folder)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def plan_files(folder: Path) -> list[Path]:
    """In order."""
    return sorted(folder.glob("plan-*.parquet"), key=lambda path: (len(path.name), path.name))
