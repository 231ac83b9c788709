"""What a source has that the plan of a store has not, or has differently; and the planning of what is new."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentvae.data.entries import EntryTable, SourceEntry, take
from latentvae.errors import UserError
from latentvae.images import DecodePolicy, ImageError, probe_size
from latentvae.latents.store.buckets import BucketRule
from latentvae.latents.store.plan import MAX_UNIT_BYTES, PLAN, Plan, cut_units, hash_order
from latentvae.latents.store.records import MIXED, Manifest

PROBE_THREADS = 16  # a header read waits for the disk, mostly
PROBE_BLOCK = 10_000  # probes in flight, so that a million keys do not become a million futures at once
PLANNED = ("unit", "row", "key", "uri", "offset", "width", "height", "bucket", "size", "mtime")


@dataclass(frozen=True)
class Growth:
    """How a source differs from the plan."""

    new: EntryTable  # in no unit yet, in the order of the source
    moved: pa.Table  # rows of PLAN of images that lie elsewhere, or whose size or time changed, as they are now
    touched: dict[int, list[tuple[int, SourceEntry]]]  # unit -> (row, entry) of those whose size or time changed
    num_common: int
    num_gone: int  # planned, and no longer in the source


def compare(plan: Plan, entries: EntryTable) -> Growth:
    """Join the plan and the source by key."""
    table = entries.table
    if not plan.num_images:
        return Growth(entries, PLAN.empty_table(), {}, 0, 0)
    planned = plan.columns(PLANNED)
    keys = planned["key"].cast(pa.large_string()).combine_chunks()  # may exceed the 2 GB of a string array
    if len(pc.unique(keys)) != len(keys):
        raise UserError(f"the plan in {plan.folder} is damaged: it has a key twice")
    there_or_null = pc.index_in(table["key"].cast(pa.large_string()), value_set=keys)
    places = there_or_null.combine_chunks()  # of each entry in the plan, or null
    new = EntryTable(table.filter(pc.is_null(places)))
    mask = pc.is_valid(places)
    here = table.filter(mask)
    there = _rows(planned, places.filter(mask))
    edited = _either([_differ(here["num_bytes"], there["size"]), _differ(here["mtime_ns"], there["mtime"])])
    moved = _either([edited, _differ(here["uri"], there["uri"]), _differ(here["offset"], there["offset"])])
    touched: dict[int, list[tuple[int, SourceEntry]]] = {}
    units, rows = there["unit"].to_numpy(), there["row"].to_numpy()
    current = EntryTable(here)
    for index in np.flatnonzero(edited):
        touched.setdefault(int(units[index]), []).append((int(rows[index]), current[int(index)]))
    replaced = there.set_column(3, "uri", here["uri"].cast(pa.string())).set_column(4, "offset", here["offset"])
    replaced = replaced.set_column(8, "size", here["num_bytes"]).set_column(9, "mtime", here["mtime_ns"])
    replaced = replaced.filter(pa.array(moved))
    ordered = pc.sort_indices(replaced, sort_keys=[("unit", "ascending"), ("row", "ascending")])
    replaced = _rows(replaced, ordered).cast(PLAN)
    return Growth(new, replaced, touched, len(here), len(keys) - len(here))


def _rows(table: pa.Table, places: np.ndarray | pa.Array) -> pa.Table:
    return pa.table([take(column, places) for column in table.columns], schema=table.schema)


def _differ(one: pa.ChunkedArray, other: pa.ChunkedArray) -> np.ndarray:
    """Where two columns differ; null equals null alone."""
    equal = pc.fill_null(pc.equal(one, other), False).to_numpy()
    both_null = pc.and_(pc.is_null(one), pc.is_null(other)).to_numpy()
    different: np.ndarray = ~(equal | both_null)
    return different


def _either(masks: list[np.ndarray]) -> np.ndarray:
    result: np.ndarray = np.logical_or.reduce(masks)
    return result


def plan_new_images(
    entries: EntryTable,
    manifest: Manifest,
    rule: BucketRule,
    policy: DecodePolicy,
    *,
    first_unit: int,
    unit_images: int,
    is_sequential: bool,
) -> pa.Table:
    """Cut entries into units of at most `unit_images` images and 1 GB of latents: rows of PLAN.

    Files are ordered by the hash of their keys, and where there are several buckets their headers are read, so that a
    unit holds one bucket. What lies in archives keeps its order, and its units may hold several buckets.
    """
    sizes = np.full((len(entries), 2), -1, np.int64)  # width, height
    homes = np.full(len(entries), rule.buckets[0].name if len(rule.buckets) == 1 else MIXED, dtype=object)
    table = entries.table if is_sequential else _rows(entries.table, hash_order(entries))
    if not is_sequential and len(rule.buckets) > 1:
        sizes = probe_sizes(EntryTable(table), policy)
        known = np.flatnonzero(sizes[:, 0] > 0)
        nearest = rule.nearest(sizes[known, 0], sizes[known, 1])
        homes[known] = np.array([bucket.name for bucket in rule.buckets], dtype=object)[nearest]
    bytes_of = {bucket.name: manifest.bytes_per_row(bucket) for bucket in rule.buckets}
    bytes_of[MIXED] = max(bytes_of.values())
    capacities = {name: max(1, min(unit_images, MAX_UNIT_BYTES // size)) for name, size in bytes_of.items()}
    places, units, rows = cut_units(homes.astype(str), capacities, first_unit, sequential=is_sequential)
    table = table if is_sequential else _rows(table, places)
    width, height = (pa.array(sizes[places, axis], pa.int32(), mask=sizes[places, axis] < 0) for axis in (0, 1))
    columns = {
        "unit": pa.array(units, pa.int32()),
        "row": pa.array(rows, pa.int32()),
        "key": table["key"],
        "uri": table["uri"].cast(pa.string()),
        "offset": table["offset"],
        "width": width,
        "height": height,
        "bucket": pa.array(homes[places], pa.string()),
        "size": table["num_bytes"],
        "mtime": table["mtime_ns"],
    }
    return pa.table(columns).cast(PLAN)


def probe_sizes(entries: EntryTable, policy: DecodePolicy) -> np.ndarray:
    """(N, 2) width and height after EXIF orientation, from the headers of local files; -1 where there is none."""

    def size(index: int) -> tuple[int, int]:
        entry = entries[index]
        if entry.num_bytes is None or entry.offset is not None or "://" in entry.uri:
            return (-1, -1)
        try:
            return probe_size(entry.uri, policy)
        except (ImageError, OSError):
            return (-1, -1)  # encoding meets it again, and records the reason

    sizes = np.empty((len(entries), 2), np.int64)
    with ThreadPoolExecutor(PROBE_THREADS) as pool:
        for start in range(0, len(entries), PROBE_BLOCK):
            block = range(start, min(start + PROBE_BLOCK, len(entries)))
            sizes[block.start : block.stop] = list(pool.map(size, block))
    return sizes
