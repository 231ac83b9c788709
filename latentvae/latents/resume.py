"""Open a store for writing: begin it, or continue what is there after making sure that it is the same work."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentvae.checkpoint import model_hashes
from latentvae.data.sources import ImageSource, SourceEntry
from latentvae.errors import UserError
from latentvae.files import TEMPORARY_MARK
from latentvae.images import PixelFormat
from latentvae.latents.fingerprint import differences, fingerprint, plain, require_same
from latentvae.latents.plan import Plan, Unit, plan_files, plan_images, publish, read_plan
from latentvae.latents.records import (
    DTYPES,
    TENSORS,
    Bucket,
    CommitRecord,
    Counts,
    IndexRow,
    Manifest,
    VAERecord,
    merge_sums,
)
from latentvae.latents.settings import EncodeConfig, fingerprint_fields
from latentvae.latents.store import LatentStore, content_hash, file_record, read_index
from latentvae.model.autoencoder import AutoencoderKL

logger = logging.getLogger("latentvae")

INDEX_BYTES = 300  # of a row of the index and the plan, measured generously: for the disk estimate only


@dataclass
class OpenedStore:
    """A store that this process may write, and what is known of it."""

    store: LatentStore
    manifest: Manifest
    plan: Plan
    bucket: Bucket
    pixels: PixelFormat
    positions: dict[str, int]  # key -> index in the source
    records: dict[int, CommitRecord]  # unit -> its record, for the units that were done already
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Log something that the user should know and put it into the report."""
        self.notes.append(text)
        logger.warning("%s", text)

    def note_environment(self, conditions: Mapping[str, Any]) -> None:
        """Say where units to come may differ in their last bits from those that are there."""
        changed = {phrase for record in self.records.values() for phrase in differences(record.environment, conditions)}
        for phrase in sorted(changed):
            self.note(f"note: in units that were there already {phrase}: new units may differ in the last bits")

    def commit(
        self, unit: Unit, tensors: Mapping[str, Tensor], rows: Sequence[IndexRow], conditions: Mapping[str, Any]
    ) -> CommitRecord:
        """Write the files of a unit; without tensors (no readable image) those of an empty shard."""
        if not tensors:
            manifest, bucket = self.manifest, self.bucket
            shape = (0, manifest.latent_channels, bucket.latent_height, bucket.latent_width)
            tensors = {name: torch.empty(shape, dtype=DTYPES[manifest.dtype]) for name in TENSORS[manifest.store]}
        return self.store.commit(
            unit.bucket, unit.number, tensors, rows, self.manifest.fields, self.manifest.fingerprint, conditions
        )

    def finish(self, records: Sequence[CommitRecord]) -> None:
        """Write the totals into the manifest: the store is complete."""
        totals = sum((record.counts for record in records), Counts())
        statistics = merge_sums([record.channels for record in records])
        update = {"complete": True, "totals": totals, "statistics": statistics}
        self.manifest = self.manifest.model_copy(update=update)
        if self.manifest != self.store.read_manifest():
            self.store.write_manifest(self.manifest)


def require_empty(store: LatentStore) -> None:
    """Raise a UserError where a folder that is no store holds other things: they are not ours to mix with."""
    if not store.folder.is_dir():
        raise UserError(f"{store.folder} is a file: choose another --out")
    if store.manifest_path.exists():
        return
    foreign = [path.name for path in store.folder.iterdir() if not _is_ours(path, store)]
    if foreign:
        raise UserError(
            f"{store.folder} is not empty and not a latent store (it holds {min(foreign)}): choose another --out"
        )


def _is_ours(path: Path, store: LatentStore) -> bool:
    return path.name.startswith(store.lock_path.name) or TEMPORARY_MARK in path.name


def open_store(
    store: LatentStore,
    images: ImageSource,
    model: AutoencoderKL,
    name: str | None,
    bucket: Bucket,
    pixels: PixelFormat,
    config: EncodeConfig,
) -> OpenedStore:
    """Begin or continue a store; the caller holds its lock. UserError where it was made in another way."""
    for leftover in store.folder.rglob(f"*{TEMPORARY_MARK}*"):  # of a killed run: the lock says that no other writes
        leftover.unlink(missing_ok=True)
    entries = images.entries()
    for entry in entries:
        try:
            entry.key.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the file name {entry.key!r} is not valid UTF-8: rename it") from error
    positions = {entry.key: index for index, entry in enumerate(entries)}
    hashes = model_hashes(model)
    fields = fingerprint_fields(config, hashes.encoder, bucket, pixels)
    vae = VAERecord(name=name, encoder=hashes.encoder, decoders=[hashes.decoder], config=plain(_public(model.config)))
    manifest = Manifest(
        fingerprint=fingerprint(fields),
        fields=fields,
        store=config.store,
        dtype=config.dtype,
        latent_channels=model.config.latent_channels,
        buckets=[bucket],
        vae=vae,
        source=images.name,
    )
    opened = OpenedStore(store, manifest, Plan(), bucket, pixels, positions, {})
    if store.manifest_path.exists():
        _continue_manifest(opened, store.read_manifest())
    opened.plan = read_plan(store.plan_folder)
    _grow_plan(opened, entries, images, config)
    known = opened.manifest.plan
    plan = {path.name: known.get(path.name) or file_record(path) for path in plan_files(store.plan_folder)}
    opened.manifest = opened.manifest.model_copy(update={"plan": plan})
    _read_records(opened)
    _require_unedited(opened, entries)

    gone = sum(key not in positions for key in opened.plan.keys)
    if gone:
        opened.note(f"note: {gone} planned images are no longer in {images.name}; what is encoded of them stays")
    if len(opened.records) < len(opened.plan.units):
        opened.manifest = opened.manifest.model_copy(update={"complete": False, "totals": None, "statistics": None})
        _log_estimate(opened)
    if not store.manifest_path.exists() or opened.manifest != store.read_manifest():
        store.write_manifest(opened.manifest)
    return opened


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json without diffusers' own bookkeeping (paths, versions)."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _continue_manifest(opened: OpenedStore, old: Manifest) -> None:
    """Take over the manifest that is there, or refuse; another decoder or other scaling is allowed, and noted."""
    new, where = opened.manifest, str(opened.store.folder)
    require_same(old.fields, new.fields, where, "pass the settings it was made with, or another --out")
    if old.fingerprint != new.fingerprint:
        raise UserError(f"{opened.store.manifest_path} is damaged: its fingerprint does not belong to its fields")
    decoders, config = old.vae.decoders, new.vae.config
    if new.vae.decoders[0] not in decoders:
        opened.note("note: the decoder differs from the one this store was begun with; its latents stay valid")
        decoders = [*decoders, new.vae.decoders[0]]
    for phrase in differences(old.vae.config, config):
        opened.note(f"note: in the model's config {phrase}; the store now records the latter")
    vae = old.vae.model_copy(update={"decoders": decoders, "config": config})
    opened.manifest = old.model_copy(update={"vae": vae})


def _grow_plan(opened: OpenedStore, entries: Sequence[SourceEntry], images: ImageSource, config: EncodeConfig) -> None:
    """Plan the images that are in no unit yet; units that are planned stay as they are."""
    plan, store = opened.plan, opened.store
    new = [entry for entry in entries if entry.key not in plan.keys]
    if not new:
        return
    if plan.keys and len(new) == len(entries):
        raise UserError(
            f"{store.folder} holds other images: none of its keys is in {images.name}; choose another --out"
        )
    if plan.keys:
        opened.note(f"note: {len(new)} images are new in {images.name}: they make new units")
    planned = plan_images(
        new,
        first_unit=len(plan.units),
        unit_images=config.unit_images,
        bytes_per_row=opened.manifest.bytes_per_row,
        bucket=opened.bucket,
        policy=config.policy,
    )
    if not store.manifest_path.exists():
        store.write_manifest(opened.manifest)  # first, so that a folder with a plan always is a store
    path = publish(store.plan_folder, planned)
    opened.manifest = opened.manifest.model_copy(update={"plan": opened.manifest.plan | {path.name: file_record(path)}})
    opened.plan = read_plan(store.plan_folder)


def _read_records(opened: OpenedStore) -> None:
    """The units that are done: record there, fingerprint equal, both files there with the recorded size."""
    store, manifest = opened.store, opened.manifest
    for unit in opened.plan.units:
        record = store.read_record(unit.bucket, unit.number)
        if record is None:
            continue
        *files, record_path = store.paths(unit.bucket, unit.number)
        advice = f"it is not of this store; remove it or run in another --out ({record_path.name})"
        require_same(record.fields, manifest.fields, f"unit {unit.number} of {store.folder}", advice)
        sizes = {name: file.num_bytes for name, file in record.files.items()}
        whole = all(path.exists() and path.stat().st_size == sizes.get(path.name) for path in files)
        if whole:
            opened.records[unit.number] = record
        else:
            opened.note(f"note: unit {unit.number} lacks a file or has a truncated one: it is encoded again")
            record_path.unlink()


def _require_unedited(opened: OpenedStore, entries: Sequence[SourceEntry]) -> None:
    """Raise a UserError where an image that is encoded has other bytes now. A touched file is compared by content."""
    for unit in opened.plan.units:
        if unit.number not in opened.records:
            continue
        touched = []
        for planned in unit.images:
            position = opened.positions.get(planned.key)
            entry = entries[position] if position is not None else None
            if entry is not None and (entry.num_bytes, entry.mtime_ns) != (planned.size, planned.mtime):
                touched.append((planned.row, entry))
        if not touched:
            continue
        hashes = read_index(opened.store.paths(unit.bucket, unit.number)[1], ["source_hash"])["source_hash"]
        for row, entry in touched:
            if entry.num_bytes is None or content_hash(Path(entry.uri)) != hashes[row].as_py():
                raise UserError(
                    f"{entry.key} has changed since it was encoded into {opened.store.folder}: restore it, or encode "
                    "into another --out"
                )


def _log_estimate(opened: OpenedStore) -> None:
    """How much is to do and what it takes on disk, before anything is encoded."""
    plan, manifest = opened.plan, opened.manifest
    units = [unit for unit in plan.units if unit.number not in opened.records]
    num_images = sum(len(unit.images) for unit in units)
    needed = num_images * (manifest.bytes_per_row + INDEX_BYTES)
    free = shutil.disk_usage(opened.store.folder).free
    logger.info(
        "%s: %d images in %d units to encode (%d units are there), %s %s of %s, about %.1f MB of disk (%.0f MB free)",
        opened.store.folder, num_images, len(units), len(opened.records), manifest.dtype, manifest.store,
        opened.bucket.name, needed / 1e6, free / 1e6,
    )  # fmt: skip
    if needed > free:
        opened.note(
            f"note: the store needs about {needed / 1e6:.0f} MB more and {free / 1e6:.0f} MB are free: the run will "
            "stop when the disk is full, and can be continued"
        )
