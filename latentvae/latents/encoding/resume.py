"""Open a store for writing: begin it, or continue what is there after making sure that it is the same work."""

import logging
import shutil
from collections.abc import Mapping
from typing import Any, Protocol

from latentvae.errors import UserError
from latentvae.latents.encoding.growth import Growth, compare, plan_new_images
from latentvae.latents.encoding.opened import OpenedStore, plan_records
from latentvae.latents.encoding.settings import EncodeConfig, Task, new_manifest, store_kind_of
from latentvae.latents.store.files import LatentStore, content_hash
from latentvae.latents.store.fingerprint import differences, require_same
from latentvae.latents.store.lease import PLAN_LEASE, Lease, Leases
from latentvae.latents.store.leftovers import remove_temporary, remove_unnamed
from latentvae.latents.store.plan import Plan, publish
from latentvae.latents.store.records import MIXED, Manifest, StoreKind

logger = logging.getLogger("latentvae")

INDEX_BYTES = 300  # of a row of the index and the plan, measured generously: for the disk estimate only
HASHED_TOGETHER = 64  # images whose bytes are compared in one go


class Measures(Protocol):
    """What is measured where the settings say `auto`."""

    def kind(self) -> StoreKind:
        """What of the posterior is worth keeping."""
        ...

    def batch_sizes(self, limits: Mapping[str, int]) -> dict[str, int]:
        """Images per forward for each bucket in `limits`, not above its limit."""
        ...


def open_store(task: Task, leases: Leases, measures: Measures) -> OpenedStore:
    """Begin or continue a store, as one process of a launch does. UserError where it was made in another way.

    Lists the source, plans what is new, finds what was edited, and reads what is done; `measures` are asked for what
    is `auto` and not recorded yet.
    """
    store, source, config = task.store, task.source, task.config
    entries = source.entries()  # before the lease: it may take long, and several may do it at once
    with leases.wait_for(PLAN_LEASE, logger.info) as lease:
        remove_temporary(store, leases)
        old = store.read_manifest() if store.manifest_path.exists() else None
        kind = store_kind_of(config, task.vae)
        if kind == "auto":
            kind = measures.kind() if old is None else old.store
        opened = _opened(task, leases, kind)
        if old is not None:
            _continue_manifest(opened, old)
        growth = compare(opened.plan, entries)
        if opened.plan.num_images and growth.num_common == 0:
            raise UserError(
                f"{store.folder} holds other images: none of its keys is in {source.name}; choose another --out"
            )
        _read_records(opened)
        remove_unnamed(store, leases, opened.records.values())
        lease.require_held()
        if old is None:
            store.write_manifest(opened.manifest)  # first, so that a folder with a plan always is a store
        _follow(opened, growth, config, lease)
        if config.retry_errors:
            _forget(opened, {n for n, record in opened.records.items() if record.counts.error}, "with errors")
        update: dict[str, Any] = {"plan": plan_records(opened.plan, opened.manifest.plan)}
        if config.batch_size == "auto":
            recorded = opened.manifest.batch_sizes
            update["batch_sizes"] = recorded | measures.batch_sizes(_unmeasured(opened, recorded))
        if len(opened.records) < len(opened.plan.units):
            update |= {"complete": False, "totals": None, "statistics": None}
            _log_estimate(opened)
        opened.manifest = opened.manifest.model_copy(update=update)
        if opened.manifest != store.read_manifest():
            lease.require_held()
            store.write_manifest(opened.manifest)
    return opened


def join_store(task: Task, leases: Leases) -> OpenedStore:
    """Work on a store that another process of the same launch has opened: without listing the source again."""
    manifest = task.store.read_manifest()
    opened = _opened(task, leases, manifest.store)
    require_same_work(task.store, manifest, opened.manifest)
    opened.manifest = manifest
    return opened


def _opened(task: Task, leases: Leases, kind: StoreKind) -> OpenedStore:
    plan = Plan(task.store.plan_folder)
    return OpenedStore(task.store, new_manifest(task, kind), plan, task.rule, task.pixels, task.source, leases)


def require_same_work(store: LatentStore, old: Manifest, new: Manifest) -> None:
    """UserError where `new` would make other latents than the store holds, naming every field that differs."""
    advice = "pass the settings it was made with, or another --out"
    require_same(old.fields, new.fields, str(store.folder), advice)
    if old.fingerprint != new.fingerprint:
        raise UserError(f"{store.manifest_path} is damaged: its fingerprint does not belong to its fields")


def _continue_manifest(opened: OpenedStore, old: Manifest) -> None:
    """Take over the manifest that is there, or refuse; another decoder or other scaling is allowed, and noted."""
    require_same_work(opened.store, old, opened.manifest)
    new = opened.manifest
    decoders = old.vae.decoders
    if new.vae.decoders[0] not in decoders:
        opened.note("note: the decoder differs from the one this store was begun with; its latents stay valid")
        decoders = [*decoders, new.vae.decoders[0]]
    for phrase in differences(old.vae.config, new.vae.config):
        opened.note(f"note: in the model's config {phrase}; the store now records the latter")
    vae = new.vae.model_copy(update={"decoders": decoders})
    opened.manifest = old.model_copy(update={"vae": vae, "source": new.source, "source_options": new.source_options})


def _read_records(opened: OpenedStore) -> None:
    """The units that are done: record there, fingerprint equal, all files there with the recorded size."""
    store, manifest = opened.store, opened.manifest
    for unit in opened.plan.units:
        record = store.read_record(unit.bucket, unit.number)
        if record is None:
            continue
        path = store.record_path(unit.bucket, unit.number)
        advice = f"it is not of this store; remove it or run in another --out ({path.name})"
        require_same(record.fields, manifest.fields, f"unit {unit.number} of {store.folder}", advice)
        sizes = {store.folder / name: file.num_bytes for name, file in record.files.items()}
        if all(file.exists() and file.stat().st_size == size for file, size in sizes.items()):
            opened.records[unit.number] = record
        else:
            opened.note(f"note: unit {unit.number} lacks a file or has a truncated one: it is encoded again")
            path.unlink()


def _follow(opened: OpenedStore, growth: Growth, config: EncodeConfig, lease: Lease) -> None:
    """Bring the plan up to the source: new images make new units, edited ones have their units redone."""
    store, source = opened.store, opened.source
    if len(growth.moved):
        edited = _edited_units(opened, growth)
        _forget(opened, edited, f"whose images were edited in {source.name}")
        lease.require_held()
        publish(store.plan_folder, growth.moved, len(opened.plan.files))  # last: killed before, the edit is found again
        opened.plan.refresh()
        # committed by others since the records were read: perhaps from images as they were before
        late = {number for number in growth.touched if number not in opened.records and opened.is_done(number)}
        _forget(opened, late, f"that were committed while images changed in {source.name}")
    if growth.num_gone:
        opened.note(
            f"note: {growth.num_gone} planned images are no longer in {source.name}; what is encoded of them stays"
        )
    if len(growth.new):
        if opened.plan.num_images:
            opened.note(f"note: {len(growth.new)} images are new in {source.name}: they make new units")
        table = plan_new_images(
            growth.new,
            opened.manifest,
            opened.rule,
            config.policy,
            first_unit=len(opened.plan.units),
            unit_images=config.unit_images,
            is_sequential=source.is_sequential,
        )
        lease.require_held()  # reading headers takes long
        publish(store.plan_folder, table, len(opened.plan.files))
    opened.plan.refresh()


def _unmeasured(opened: OpenedStore, recorded: Mapping[str, int]) -> dict[str, int]:
    """Buckets that units to come need and that have no batch size => images in the largest of these units."""
    limits: dict[str, int] = {}
    for unit in opened.plan.units:
        homes = [bucket.name for bucket in opened.rule.buckets] if unit.bucket == MIXED else [unit.bucket]
        for home in set(homes) - recorded.keys() if unit.number not in opened.records else ():
            limits[home] = max(limits.get(home, 1), unit.num_images)
    return limits


def _edited_units(opened: OpenedStore, growth: Growth) -> set[int]:
    """The committed units of which an image has other bytes now. A touched file is compared by content."""
    edited: set[int] = set()
    if growth.touched:
        logger.info(
            "%d encoded images may have been edited: comparing their content", sum(map(len, growth.touched.values()))
        )
    for number, rows in growth.touched.items():
        record = opened.records.get(number)
        if record is None:
            continue
        hashes = opened.store.read_unit_index(record, ["source_hash"])["source_hash"].to_pylist()
        for start in range(0, len(rows), HASHED_TOGETHER):
            part = rows[start : start + HASHED_TOGETHER]
            for (row, _), content in zip(part, opened.source.fetch([entry for _, entry in part]), strict=True):
                if isinstance(content, Exception) or content_hash(content) != hashes[row]:
                    edited.add(number)
    return edited


def _forget(opened: OpenedStore, units: set[int], why: str) -> None:
    """Make committed units undone: their records go, their files stay until others have taken their place."""
    if not units:
        return
    num_images = sum(opened.plan.units[number].num_images for number in units)
    opened.note(f"note: {len(units)} units {why} are encoded again ({num_images} images)")
    for number in units:
        opened.store.record_path(opened.plan.units[number].bucket, number).unlink(missing_ok=True)
        opened.records.pop(number, None)


def _log_estimate(opened: OpenedStore) -> None:
    """How much is to do and what it takes on disk, before anything is encoded."""
    manifest = opened.manifest
    units = [unit for unit in opened.plan.units if unit.number not in opened.records]
    sizes = {bucket.name: manifest.bytes_per_row(bucket) for bucket in manifest.buckets}
    largest = max(sizes.values())
    num_images = sum(unit.num_images for unit in units)
    needed = sum(unit.num_images * (sizes.get(unit.bucket, largest) + INDEX_BYTES) for unit in units)
    free = shutil.disk_usage(opened.store.folder).free
    logger.info(
        "%s: %d images in %d units to encode (%d units are there), %s %s of %s, about %.1f MB of disk (%.0f MB free)",
        opened.store.folder, num_images, len(units), len(opened.records), manifest.dtype, manifest.store,
        opened.rule.spec, needed / 1e6, free / 1e6,
    )  # fmt: skip
    if needed > free:
        opened.note(
            f"note: the store needs about {needed / 1e6:.0f} MB more and {free / 1e6:.0f} MB are free: the run will "
            "stop when the disk is full, and can be continued"
        )
