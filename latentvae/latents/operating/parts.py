"""A store read through from the first unit to the last; random access is `LatentDataset`'s."""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor

from latentvae.errors import UserError
from latentvae.latents.reading.readable import ReadableStore, bucket_size
from latentvae.latents.store.records import IndexRow


@dataclass(frozen=True)
class StoredPart:
    """The latents of one unit and bucket, raw, and their index rows, both in the order of the shard."""

    name: str  # of the shard in the store
    bucket: str
    rows: list[IndexRow]
    tensors: dict[str, Tensor]  # "mean", ... -> (N, D, h, w) in the stored dtype, memory-mapped


def stored_buckets(store: ReadableStore) -> list[str]:
    """Names of the buckets that hold latents, by width and height."""
    return sorted({shard.bucket for shard in store.shards}, key=bucket_size)


def stored_parts(store: ReadableStore, bucket: str | None = None) -> Iterator[StoredPart]:
    """Every shard in the order of the units, or those of one bucket. UserError where one does not fit its index."""
    for unit in store.units:
        places = [number for number in unit.shards if bucket in (None, store.shards[number].bucket)]
        if not places:
            continue
        table = store.index(unit)
        for number in places:
            file = store.shards[number]
            rows = [IndexRow(**row) for row in _in_bucket(table, file.bucket).to_pylist()]
            tensors = store.shard(number).tensors
            is_whole = [row.row for row in rows] == list(range(len(rows)))
            if not is_whole or any(len(tensor) != len(rows) for tensor in tensors.values()):
                raise UserError(f"{file.name} of {store.name} does not fit its index: run latentvae verify")
            if set(tensors) != set(store.manifest.tensors):
                raise UserError(
                    f"{file.name} of {store.name} does not hold what the manifest says: run latentvae verify"
                )
            yield StoredPart(file.name, file.bucket, rows, tensors)


def stored_keys(store: ReadableStore, bucket: str | None = None) -> list[str]:
    """Of all latents, in the order of `stored_parts`."""
    found: list[str] = []
    for unit in store.units:
        table = store.index(unit, ["key", "bucket", "row"])
        for number in unit.shards:
            name = store.shards[number].bucket
            if bucket in (None, name):
                found += _in_bucket(table, name)["key"].to_pylist()
    return found


def _in_bucket(table: pa.Table, bucket: str) -> pa.Table:
    return table.filter(pc.equal(table["bucket"], bucket)).sort_by("row")
