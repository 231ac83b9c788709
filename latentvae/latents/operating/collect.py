"""Garbage of a store: what edits, retries and killed processes leave behind. Nothing that a record names is touched."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from latentvae.errors import UserError
from latentvae.files import TEMPORARY_MARK
from latentvae.latents.store.files import LatentStore
from latentvae.latents.store.lease import PLAN_LEASE, SUFFIX, Leases
from latentvae.latents.store.leftovers import removable, unnamed_files
from latentvae.latents.store.records import unit_name

RECORD_FILE = re.compile(r"u(\d{6,})\.json")


@dataclass(frozen=True)
class Garbage:
    """A file that nobody needs."""

    path: str  # in the store
    num_bytes: int
    why: str


@dataclass(frozen=True)
class GarbageReport:
    """What was removed, or would be."""

    store: Path
    dry_run: bool
    files: list[Garbage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Of all of them."""
        return sum(file.num_bytes for file in self.files)

    def __str__(self) -> str:
        what = "would be removed" if self.dry_run else "removed"
        lines = [f"{file.path}: {file.num_bytes} bytes, {file.why}" for file in self.files]
        return "\n".join([*lines, f"{self.store}: {len(self.files)} files {what}, {self.num_bytes} bytes", *self.notes])


def collect_garbage(store: str | Path, *, dry_run: bool = False) -> GarbageReport:
    """Remove files in shards/ that no record names, temporary files of the dead, and leases that are over.

    An encode may run meanwhile: a unit's files go only while its lease is in this process's hands. Files that are not
    of the names that a store gives stay where they are.

    Raises UserError where the folder is no store, or a record is damaged (it may name any file), or nothing can be
    written or removed in it.
    """
    layout = LatentStore(store)
    layout.read_manifest()
    try:
        return _collected(layout, dry_run)
    except OSError as error:
        raise UserError(f"cannot clean up {store}: {error.strerror or error}") from error


def _collected(layout: LatentStore, dry_run: bool) -> GarbageReport:
    leases = Leases(layout.leases)
    found: list[Garbage] = []
    notes: list[str] = []
    try:
        found += _ended_leases(layout, leases, dry_run)
        live = leases.live_tokens()
        records = (layout.read_record(bucket, unit) for bucket, unit, _ in record_files(layout))
        for unit, paths in unnamed_files(layout, filter(None, records)).items():
            lease = leases.path(unit_name(unit))
            why = "no record names it"
            if dry_run:
                files = [] if lease_token(lease) in live else [_garbage(layout, path, why) for path in paths]
            else:
                with removable(layout, leases, unit, paths) as garbage:
                    files = [_removed(layout, path, why) for path in garbage or ()]
            if not files:
                notes.append(f"note: unit {unit} is being encoded: {len(paths)} files are left alone")
            found += filter(None, files)
        found += _temporary_files(layout, leases, dry_run)
    finally:
        leases.close()
    if live:
        notes.append("note: an encode is running; what it works on is left alone")
    return GarbageReport(layout.folder, dry_run, found, notes)


def lease_token(path: Path) -> str:
    """Of a lease file, as `Leases.live_tokens` names it."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        owner = None
    return str(owner.get("token") if isinstance(owner, dict) else None)


def record_files(layout: LatentStore) -> Iterator[tuple[str, int, Path]]:
    """(home bucket, unit, path) of every commit record there is."""
    for path in sorted(layout.shards.glob("*/u*.json")):
        if match := RECORD_FILE.fullmatch(path.name):
            yield path.parent.name, int(match[1]), path


def _ended_leases(layout: LatentStore, leases: Leases, dry_run: bool) -> list[Garbage]:
    files = [_garbage(layout, path, "lease that is over") for path in sorted(layout.leases.glob(f"*{SUFFIX}"))]
    if not dry_run:
        leases.sweep()
        return [file for file in files if file is not None and not (layout.folder / file.path).exists()]
    live = leases.live_tokens()
    return [file for file in files if file is not None and lease_token(layout.folder / file.path) not in live]


def _temporary_files(layout: LatentStore, leases: Leases, dry_run: bool) -> list[Garbage]:
    """Those of the dead. A name in shards/ has the token of its lease; the others belong to who holds the plan's."""
    lease = None if dry_run else leases.claim(PLAN_LEASE)
    try:
        paths = sorted(layout.folder.rglob(f"*{TEMPORARY_MARK}*"))
        live = leases.live_tokens() - ({lease.token} if lease else set())  # after listing: one that ended left nothing
        found = []
        for path in paths:
            is_claimed = any(token in path.name for token in live)
            has_owner = is_claimed or (layout.shards not in path.parents and bool(live if dry_run else lease is None))
            if not has_owner and path.parent != layout.leases and path.is_file():
                take = _garbage if dry_run else _removed
                found.append(take(layout, path, "left by a process that was killed"))
        return [file for file in found if file is not None]
    finally:
        if lease is not None:
            leases.release(lease)


def _garbage(layout: LatentStore, path: Path, why: str) -> Garbage | None:
    """None where it went this moment."""
    try:
        return Garbage(layout.relative(path), path.stat().st_size, why)
    except FileNotFoundError:
        return None


def _removed(layout: LatentStore, path: Path, why: str) -> Garbage | None:
    found = _garbage(layout, path, why)
    path.unlink(missing_ok=True)
    return found
