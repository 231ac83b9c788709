"""What edits, retries and killed processes leave in a store: temporary files, and files that no record names."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from latentvae.files import TEMPORARY_MARK
from latentvae.latents.store.files import LatentStore
from latentvae.latents.store.lease import Leases
from latentvae.latents.store.records import CommitRecord, unit_name

UNIT_FILE = re.compile(r"u(\d{6,})-[0-9a-f]{8}\.(?:safetensors|parquet)")  # index or shard, as `write_unit` names them


def remove_temporary(store: LatentStore, leases: Leases) -> None:
    """Of processes that are dead or were overtaken, for who holds the plan's lease; the living's carry their token."""
    leases.sweep()
    paths = list(store.folder.rglob(f"*{TEMPORARY_MARK}*"))
    live = leases.live_tokens()  # after listing: a lease that began since then may own any newer file
    for path in paths:
        if path.parent != store.leases and not any(token in path.name for token in live):
            path.unlink(missing_ok=True)


def unnamed_files(store: LatentStore, records: Iterable[CommitRecord]) -> dict[int, list[Path]]:
    """Unit -> its index and shard files that none of the records names."""
    there = sorted(store.shards.glob("*/u*-*.*"))
    named = {name for record in records for name in record.files}
    found: dict[int, list[Path]] = {}
    for path in there:
        match = UNIT_FILE.fullmatch(path.name)
        if match is not None and store.relative(path) not in named:
            found.setdefault(int(match[1]), []).append(path)
    return found


@contextmanager
def removable(store: LatentStore, leases: Leases, unit: int, paths: Iterable[Path]) -> Iterator[list[Path] | None]:
    """Those of `paths` that no record of the unit names, while its lease is held; None where another process has it.

    With the lease in hand nobody commits the unit: what no record names now, none will name.
    """
    lease = leases.claim(unit_name(unit))
    if lease is None:
        yield None
        return
    try:
        records = [store.read_record(path.parent.name, unit) for path in store.shards.glob(f"*/{unit_name(unit)}.json")]
        named = {name for record in records if record is not None for name in record.files}
        yield [path for path in paths if store.relative(path) not in named]
    finally:
        leases.release(lease)


def remove_unnamed(store: LatentStore, leases: Leases, records: Iterable[CommitRecord]) -> None:
    """Remove what neither `records` nor newer ones name, but for units that other processes work on."""
    for unit, paths in unnamed_files(store, records).items():
        with removable(store, leases, unit, paths) as garbage:
            for path in garbage or ():
                path.unlink(missing_ok=True)
