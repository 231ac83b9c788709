"""Is a store whole? Quick: all that can be told without the latents. Full: every byte. Deep: rows encoded again."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow.compute as pc

from latentvae.errors import UserError
from latentvae.files import TEMPORARY_MARK
from latentvae.latents.operating.collect import lease_token, record_files
from latentvae.latents.operating.deep import DeepReport, check_deep
from latentvae.latents.operating.unit_check import unit_problems
from latentvae.latents.store.files import LatentStore, file_record, is_sealed
from latentvae.latents.store.fingerprint import fingerprint
from latentvae.latents.store.lease import PLAN_LEASE, SUFFIX, Leases
from latentvae.latents.store.leftovers import UNIT_FILE
from latentvae.latents.store.plan import Plan, plan_files
from latentvae.latents.store.records import CommitRecord, Counts, Manifest, merge_sums, unit_name
from latentvae.progress import ImageProgress

logger = logging.getLogger("latentvae")

Level = Literal["quick", "full"]


@dataclass(frozen=True)
class VerifyReport:
    """`problems` is empty where the store is whole; each is one line that names the file or the unit."""

    store: Path
    units: int  # with a readable record
    counts: Counts
    problems: list[str] = field(default_factory=list)
    damaged_units: list[int] = field(default_factory=list)  # committed, and to be encoded again
    dropped_units: list[int] = field(default_factory=list)  # of these, whose records were removed
    deep: DeepReport | None = None

    @property
    def is_whole(self) -> bool:
        """No problem was found."""
        return not self.problems

    def __str__(self) -> str:
        state = "whole" if self.is_whole else f"{len(self.problems)} problems"
        lines = [
            f"{self.store}: {state}; {self.units} units, {self.counts.inputs} inputs: {self.counts.ok} with latents, "
            f"{self.counts.error} errors, {self.counts.skipped} skipped",
            *self.problems,
        ]
        lines += [str(self.deep)] if self.deep is not None else []
        if self.dropped_units:
            lines.append(f"{len(self.dropped_units)} units were dropped: run the same encode again to make them anew")
        elif self.damaged_units:
            lines.append(
                f"{len(self.damaged_units)} units are damaged: --drop-damaged, then the same encode, redoes them"
            )
        return "\n".join(lines)


@dataclass
class _Findings:
    general: list[str] = field(default_factory=list)  # about manifest and plan: without them nothing can be mended
    units: dict[int, list[str]] = field(default_factory=dict)  # of committed units
    other: list[str] = field(default_factory=list)
    records: dict[int, CommitRecord] = field(default_factory=dict)
    homes: dict[int, str] = field(default_factory=dict)


def verify_store(
    store: str | Path,
    *,
    level: Level = "quick",
    deep: int = 0,
    vae: Any = None,
    source: Any = None,
    device: str | None = None,
    drop_damaged: bool = False,
    progress: bool = True,
) -> VerifyReport:
    """Check a store. Changes nothing, unless `drop_damaged`.

    Args:
        store: folder of a latent store.
        level: "quick" reads manifest, plan, records, indexes and the headers and sizes of shards, and finds every
            planned key in exactly one row; "full" also hashes every shard, so that any flipped byte is found.
        deep: so many rows, spread over units and buckets, are read from the source and encoded again (deep.py).
        vae: for `deep`: a model or whatever `load_autoencoder` takes; None: the one that the store names.
        source: for `deep`: whatever `open_source` takes; None: the one that the store names.
        device: for `deep`, such as cuda:1; None: the accelerator where there is one, else cpu.
        drop_damaged: remove the commit records of damaged units, so that the next encode makes them anew.
        progress: a bar on a terminal, log lines elsewhere.

    Raises UserError where the folder is no store at all, and where what was asked for cannot be done.
    """
    if level not in ("quick", "full"):
        raise UserError(f"level is {level!r}: it must be quick or full")
    if deep < 0:
        raise UserError(f"deep is {deep}: it must be at least 0")
    layout = LatentStore(store)
    manifest = layout.read_manifest()
    found = _Findings()
    plan = _checked_plan(layout, manifest, found)
    _check_units(layout, manifest, plan, found, level == "full", progress)
    _check_totals(manifest, plan, found)
    found.other += _extra_files(layout, found)
    again = None
    if deep:
        if plan is None:
            raise UserError(f"{store} cannot be checked deeply: {found.general[0]}")
        intact = [record for number, record in found.records.items() if number not in found.units]
        again = check_deep(
            layout, manifest, plan, intact, deep, vae=vae, source=source, device=device, progress=progress
        )
        for number, lines in again.problems.items():
            found.units.setdefault(number, []).extend(lines)
        found.other += again.unavailable
    in_units = [line for number in sorted(found.units) for line in found.units[number]]
    problems = [*found.general, *in_units, *found.other]
    dropped = _drop(layout, found) if drop_damaged and found.units else []
    counts = sum((record.counts for record in found.records.values()), Counts())
    return VerifyReport(layout.folder, len(found.records), counts, problems, sorted(found.units), dropped, again)


def _checked_plan(layout: LatentStore, manifest: Manifest, found: _Findings) -> Plan | None:
    """The plan, if its files are those that the manifest names: damaged ones are not parsed."""
    if fingerprint(manifest.fields) != manifest.fingerprint:
        found.general.append("manifest.json: its fingerprint does not belong to its fields")
    if not is_sealed(layout.manifest_path):
        found.general.append("manifest.json: its bytes are not those that were written")
    there = {path.name: file_record(path) for path in plan_files(layout.plan_folder)}
    wrong = [name for name in sorted(there.keys() | manifest.plan.keys()) if there.get(name) != manifest.plan.get(name)]
    found.general += [f"plan/{name}: it is not the file that the manifest names" for name in wrong]
    if wrong:
        return None
    try:
        plan = Plan(layout.plan_folder)
        keys = plan.columns(["key"])["key"]
        if len(pc.unique(keys)) != len(keys):
            twice = next(pair["values"].as_py() for pair in pc.value_counts(keys) if pair["counts"].as_py() > 1)
            found.general.append(f"plan: it has the key {twice} more than once")
        return plan
    except UserError as error:
        found.general.append(str(error))
        return None


def _check_units(
    layout: LatentStore, manifest: Manifest, plan: Plan | None, found: _Findings, full: bool, progress: bool
) -> None:
    """Every unit of the plan; where that cannot be read, every unit that has a record."""
    if plan is not None:
        found.homes = {unit.number: unit.bucket for unit in plan.units}
    else:
        found.homes = {number: home for home, number, _ in record_files(layout)}
    missing: list[int] = []
    done = 0
    total = manifest.totals.inputs if manifest.totals else plan.num_images if plan else 0
    with ImageProgress("verifying", total, enabled=progress and full) as bar:
        for number, home in found.homes.items():
            keys = [image.key for image in plan.images(number)] if plan is not None else None
            lines, record = _unit_state(layout, manifest, number, home, keys, full)
            if lines:
                found.units[number] = lines
            if record is not None:
                found.records[number] = record
                done += record.counts.inputs
                bar.update(done)
            elif not lines:
                missing.append(number)
    if missing:
        found.other.append(
            f"{len(missing)} of {len(found.homes)} units are not encoded yet, the first is unit {missing[0]} "
            "(run encode again)"
        )


def _unit_state(
    layout: LatentStore, manifest: Manifest, number: int, home: str, keys: list[str] | None, full: bool
) -> tuple[list[str], CommitRecord | None]:
    """Problems and record of a unit; looked at again where it was redone meanwhile."""
    while True:
        try:
            record = layout.read_record(home, number)
        except UserError as error:
            return [str(error)], None
        if record is None:
            return [], None
        try:
            lines = list(unit_problems(layout, manifest, number, home, record, keys, full=full))
        except FileNotFoundError:  # the record itself went
            continue
        try:
            if not lines or layout.read_record(home, number) == record:
                return lines, record
        except UserError:
            return lines, record


def _check_totals(manifest: Manifest, plan: Plan | None, found: _Findings) -> None:
    records = [found.records[number] for number in sorted(found.records)]
    if not manifest.complete:
        found.other.append("manifest.json: the store is not complete (run encode again)")
    elif plan is not None and len(records) == len(plan.units) and not found.units:  # damaged records do not add up
        if manifest.totals != sum((record.counts for record in records), Counts()):
            found.other.append("manifest.json: its totals are not the sums of the commit records")
        if records and manifest.statistics != merge_sums([record.channels for record in records]):
            found.other.append("manifest.json: its statistics are not those of the commit records")


def _extra_files(layout: LatentStore, found: _Findings) -> Iterator[str]:
    """Files that nothing of the store names, and that no living process works on."""
    expected = {layout.manifest_path, *plan_files(layout.plan_folder)}
    expected |= {layout.record_path(home, number) for number, home in found.homes.items()}
    expected |= {layout.folder / name for record in found.records.values() for name in record.files}
    paths = sorted(path for path in layout.folder.rglob("*") if path not in expected and not path.is_dir())
    leases = Leases(layout.leases)
    try:
        live = leases.live_tokens() if layout.leases.is_dir() else set()
    except OSError:  # a folder that cannot be written: the clock of its file server cannot be asked
        live = {lease_token(path) for path in layout.leases.glob(f"*{SUFFIX}")}
    for path in paths:
        name = layout.relative(path)
        unit = UNIT_FILE.fullmatch(path.name)
        if path.parent == layout.leases and path.suffix == SUFFIX:
            if lease_token(path) not in live and path.exists():
                yield f"{name}: left by an encode that was killed (latentvae gc removes it)"
        elif TEMPORARY_MARK in path.name:
            if not live and path.exists():  # else it may be of the encode that is running
                yield f"{name}: left by an encode that was killed (latentvae gc removes it)"
        elif unit is None or layout.shards not in path.parents:
            yield f"{name}: not a file of this store"
        elif int(unit[1]) in found.homes and int(unit[1]) not in found.records and int(unit[1]) in found.units:
            continue  # its record is damaged, and may have named it
        elif _is_named(layout, found, int(unit[1]), name):
            continue  # by a record that was committed while this was looking
        elif lease_token(leases.path(unit_name(int(unit[1])))) not in live and path.exists():
            yield f"{name}: no commit record names it (latentvae gc removes it)"


def _is_named(layout: LatentStore, found: _Findings, unit: int, name: str) -> bool:
    try:
        record = layout.read_record(found.homes[unit], unit) if unit in found.homes else None
    except UserError:
        return False
    return record is not None and name in record.files


def _drop(layout: LatentStore, found: _Findings) -> list[int]:
    """Remove the records of damaged units, and say in the manifest that the store is not complete."""
    if found.general:
        raise UserError(
            f"{layout.folder}: nothing was dropped, for what names the units is damaged: {found.general[0]}"
        )
    leases = Leases(layout.leases)
    try:
        lease = leases.claim(PLAN_LEASE)
        if lease is None:
            holder = leases.holder(PLAN_LEASE)
            raise UserError(f"{layout.folder} is being opened or finished by {holder}: nothing was dropped, try again")
        manifest = layout.read_manifest()
        layout.write_manifest(manifest.model_copy(update={"complete": False, "totals": None, "statistics": None}))
        for number in sorted(found.units):
            logger.warning("unit %d is damaged: its commit record is removed", number)
            layout.record_path(found.homes[number], number).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot drop units of {layout.folder}: {error.strerror or error}") from error
    finally:
        leases.close()
    return sorted(found.units)
