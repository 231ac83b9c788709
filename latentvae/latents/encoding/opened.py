"""A store that a process may write: its manifest, its plan, its leases, and what is done in it."""

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentvae.data.entries import ImageSource
from latentvae.errors import UserError
from latentvae.files import TEMPORARY_MARK
from latentvae.images import PixelFormat
from latentvae.latents.store.buckets import BucketRule
from latentvae.latents.store.files import LatentStore, file_record
from latentvae.latents.store.fingerprint import differences
from latentvae.latents.store.lease import PLAN_LEASE, Leases
from latentvae.latents.store.leftovers import remove_temporary, remove_unnamed
from latentvae.latents.store.plan import Plan, PlannedImage
from latentvae.latents.store.records import CommitRecord, Counts, FileRecord, Manifest, merge_sums

logger = logging.getLogger("latentvae")


def require_local(store: LatentStore) -> None:
    """UserError where the folder is a URL, whose "//" a path makes one "/"."""
    first = next(iter(store.folder.parts), "")
    if len(first) > 2 and first.endswith(":"):  # not a drive
        raise UserError(
            f"--out is {store.folder}: stores are written to a folder of this machine; upload it afterwards"
        )


def require_outside(store: LatentStore, source: object) -> None:
    """UserError where a folder of archives, as which `source` was opened, would from now on list the store's files."""
    folder = Path(source) if isinstance(source, str | Path) else None
    if folder is not None and folder.is_dir() and store.folder.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--out {store.folder} lies in {source}, whose archives it would be among: choose another")


def require_empty(store: LatentStore) -> None:
    """Raise a UserError where a folder that is no store holds other things: they are not ours to mix with."""
    if not store.folder.is_dir():
        raise UserError(f"{store.folder} is a file: choose another --out")
    if store.manifest_path.exists():
        return
    ours = (store.leases.name,)
    foreign = [
        path.name for path in store.folder.iterdir() if path.name not in ours and TEMPORARY_MARK not in path.name
    ]
    if foreign:
        raise UserError(
            f"{store.folder} is not empty and not a latent store (it holds {min(foreign)}): choose another --out"
        )


@dataclass
class OpenedStore:
    """A store that this process may write, and what is known of it."""

    store: LatentStore
    manifest: Manifest
    plan: Plan
    rule: BucketRule
    pixels: PixelFormat
    source: ImageSource
    leases: Leases
    records: dict[int, CommitRecord] = field(default_factory=dict)  # unit -> its record, where it was done already
    notes: list[str] = field(default_factory=list)
    _planning: threading.Lock = field(default_factory=threading.Lock)

    def note(self, text: str) -> None:
        """Log something that the user should know and put it into the report."""
        self.notes.append(text)
        logger.warning("%s", text)

    def note_environment(self, conditions: Mapping[str, Any]) -> None:
        """Say where units to come may differ in their last bits from those that are there."""
        changed = {phrase for record in self.records.values() for phrase in differences(record.environment, conditions)}
        for phrase in sorted(changed):
            self.note(f"note: in units that were there already {phrase}: new units may differ in the last bits")

    def is_done(self, unit: int) -> bool:
        """Whether a unit is committed, by whomever."""
        return self.store.record_path(self.plan.units[unit].bucket, unit).exists()

    def todo(self) -> list[int]:
        """The units that are not done."""
        return [unit.number for unit in self.plan.units if not self.is_done(unit.number)]

    def planned(self, unit: int) -> list[PlannedImage]:
        """Its images by the newest plan. The thread that reads asks for them, and the one that commits."""
        with self._planning:
            self.plan.refresh()
            return self.plan.images(unit)

    def finish(self) -> list[CommitRecord] | None:
        """Remove what no record names, and write the totals into the manifest, so that the store is complete.

        Returns the records of all units in order; None where another process has found more to do. Of many processes
        the first one finishes the store, and the others only read.
        """
        with self.leases.wait_for(PLAN_LEASE, logger.info) as lease:
            if self.plan.refresh() or self.todo():
                return None
            self.manifest = self.store.read_manifest()
            if self.manifest.complete and self.manifest.plan.keys() == {path.name for path in self.plan.files}:
                records = None
            elif (records := self._all_records()) is None:
                return None
            else:
                lease.require_held()
                remove_temporary(self.store, self.leases)
                remove_unnamed(self.store, self.leases, records)
                # who published a file of the plan may have been killed before it was in the manifest
                plan = plan_records(self.plan, self.manifest.plan)
                totals = sum((record.counts for record in records), Counts())
                statistics = merge_sums([record.channels for record in records])
                update = {"complete": True, "plan": plan, "totals": totals, "statistics": statistics}
                self.manifest = self.manifest.model_copy(update=update)
                lease.require_held()
                self.store.write_manifest(self.manifest)
        return records or self._all_records()

    def _all_records(self) -> list[CommitRecord] | None:
        """Of all units in order; None where one is not done."""
        found = [self.store.read_record(unit.bucket, unit.number) for unit in self.plan.units]
        records = [record for record in found if record is not None]
        return records if len(records) == len(found) else None


def plan_records(plan: Plan, known: Mapping[str, FileRecord]) -> dict[str, FileRecord]:
    """Name of each plan file -> what it must be; those that are not `known` are hashed."""
    return {path.name: known.get(path.name) or file_record(path) for path in plan.files}
