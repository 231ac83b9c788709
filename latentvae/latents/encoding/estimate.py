"""What encoding a source would be, found out without writing anything: sizes, disk, time, and what is done already."""

import itertools
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from latentvae.errors import UserError
from latentvae.files import temporary_path
from latentvae.latents.encoding.encode import EncodeJob
from latentvae.latents.encoding.encode_plan import EncodePlan
from latentvae.latents.encoding.encoder import LatentEncoder
from latentvae.latents.encoding.growth import compare, plan_new_images
from latentvae.latents.encoding.launch import Launch
from latentvae.latents.encoding.measure import calibrate, measured_batch_sizes, noise_images
from latentvae.latents.encoding.placements import Placements, SizeSample, placed, probed
from latentvae.latents.encoding.resume import INDEX_BYTES, require_same_work
from latentvae.latents.encoding.settings import EncodeConfig, new_manifest, resolved_config, store_kind_of
from latentvae.latents.store.buckets import BucketRule
from latentvae.latents.store.files import LatentStore
from latentvae.latents.store.plan import Plan
from latentvae.latents.store.records import DTYPES, TENSORS, Bucket, Manifest, StoreDtype, StoreKind, tensor_names

TIMED_BATCHES, TIMED_SECONDS = 5, 20.0  # the time is told by as many batches, or by those that end by then


def plan_dataset(
    source: str | Path | object,
    vae: Any,
    out: str | Path | None = None,
    config: EncodeConfig | None = None,
    **options: Any,
) -> EncodePlan:
    """What `encode_dataset` would do with the same arguments. Nothing is written.

    The source is listed. Sizes are read from the headers of all files where there are several buckets, else of up to
    2,000; of archives, from up to 256 images. These are encoded too, and some batches besides, for the time.

    Args:
        source, vae, config, options: as `encode_dataset` takes them.
        out: folder of the store, which may be there; None: a new one.

    Raises UserError where `encode_dataset` would before it encodes.
    """
    config = resolved_config(config, options)
    launch = Launch.alone(config.device)  # under a launcher one process plans, and the others have gone
    store = LatentStore(temporary_path(Path.cwd() / "store") if out is None else out)  # the former is not there
    job = EncodeJob.resolve(source, vae, store, config, launch)
    was_training = job.vae.module.training
    job.vae.module.eval()
    try:
        return _planned(job, None if out is None else store.folder)
    finally:
        job.vae.module.train(was_training)


def _planned(job: EncodeJob, folder: Path | None) -> EncodePlan:
    config, rule, store = job.config, job.rule, job.store
    entries = job.source.entries()
    old = store.read_manifest() if store.manifest_path.exists() else None
    calibration = calibrate(job.unit_images(), job.latent_encoder("moments"), config.num_workers)
    kind = store_kind_of(config, job.vae)
    if kind == "auto":
        kind = calibration.kind if old is None else old.store
    manifest = new_manifest(job, kind)
    if old is not None:
        require_same_work(store, old, manifest)
    work = _work(job, manifest)
    sizes = _known_sizes(work.table) or probed(entries, config.policy)
    placements = placed(sizes or SizeSample(calibration.sizes, len(calibration.sizes) == len(entries)), rule)
    bucket = _bucket(next(iter(placements.buckets), rule.sizes[0]), rule)
    recorded = old.batch_sizes if old is not None else {}
    batch_sizes = _batch_sizes(job, bucket, recorded, max(work.units))
    encoder = job.latent_encoder(kind, batch_sizes)
    num_images = sum(work.units)
    return EncodePlan(
        source=job.source.name,
        store=folder,
        vae=f"{job.vae.class_name} {job.vae.name or 'in memory'}",
        device=str(job.launch.device),
        config=config,
        manifest=manifest,
        num_images=num_images,
        num_units=len(work.units),
        images_left=sum(itertools.compress(work.units, work.is_left)),
        units_left=sum(work.is_left),
        growth=work.growth,
        sizes=sizes or SizeSample(calibration.sizes, len(calibration.sizes) == len(entries)),
        placements=placements,
        disk=_disk(manifest, placements, num_images, job.vae.has_posterior),
        index_bytes=float(INDEX_BYTES * num_images),
        free_bytes=_free_bytes(store.folder),
        calibration=calibration,
        timed_bucket=bucket.name,
        batch_size=encoder.size_of(bucket.name),
        images_per_second=_images_per_second(encoder, bucket),
    )


@dataclass(frozen=True)
class _Work:
    """The units of a store, and those that the source makes besides."""

    table: pa.Table  # width and height of every image, null where no header was read
    units: list[int]  # images of each
    is_left: list[bool]  # for each, whether it is to be encoded
    growth: list[str]


def _work(job: EncodeJob, manifest: Manifest) -> _Work:
    store, config = job.store, job.config
    plan = Plan(store.plan_folder)
    growth = compare(plan, job.source.entries())
    if plan.num_images and not growth.num_common:
        raise UserError(
            f"{store.folder} holds other images: none of its keys is in {job.source.name}; choose another --out"
        )
    new = plan_new_images(
        growth.new,
        manifest,
        job.rule,
        config.policy,
        first_unit=len(plan.units),
        unit_images=config.unit_images,
        is_sequential=job.source.is_sequential,
    )
    is_left = []
    for unit in plan.units:
        record = store.read_record(unit.bucket, unit.number)
        with_errors = record is not None and config.retry_errors and record.counts.error > 0
        is_left.append(record is None or with_errors or unit.number in growth.touched)
    counts = np.bincount(new["unit"].to_numpy() - len(plan.units)) if len(new) else np.zeros(0, np.int64)
    phrases = {
        "new in the source": len(growth.new) if plan.num_images else 0,
        "changed on disk, whose units are counted as left (their content decides)": sum(
            map(len, growth.touched.values())
        ),
        "no longer in the source": growth.num_gone,
    }
    return _Work(
        pa.concat_tables([plan.columns(["width", "height"]), new.select(["width", "height"])]),
        [unit.num_images for unit in plan.units] + counts.tolist(),
        is_left + [True] * len(counts),
        [f"{count:,} images {phrase}" for phrase, count in phrases.items() if count],
    )


def _known_sizes(table: pa.Table) -> SizeSample | None:
    """Of the plan, where it holds them."""
    if table["width"].null_count == len(table):
        return None
    columns = [table[name].fill_null(-1).to_numpy() for name in ("width", "height")]
    return SizeSample(np.stack(columns, 1).astype(np.int64), True)


def _bucket(name: str | tuple[int, int], rule: BucketRule) -> Bucket:
    width, height = map(int, name.split("x")) if isinstance(name, str) else name
    return rule.bucket(width, height)


def _batch_sizes(job: EncodeJob, bucket: Bucket, recorded: dict[str, int], limit: int) -> dict[str, int]:
    """For `--batch-size auto`: those of the store that is there, and that of the commonest bucket."""
    if job.config.batch_size != "auto" or bucket.name in recorded:
        return recorded
    return recorded | measured_batch_sizes(job.latent_encoder("mean"), [bucket], {bucket.name: limit})


def _images_per_second(encoder: LatentEncoder, bucket: Bucket) -> float:
    """Of full batches, by their median time; one goes before that is not counted."""
    size = encoder.size_of(bucket.name)
    images, keys = noise_images(encoder.pixels, bucket, size), [str(index) for index in range(size)]
    seconds: list[float] = []
    while len(seconds) <= TIMED_BATCHES and (len(seconds) < 2 or sum(seconds) < TIMED_SECONDS):
        began = time.perf_counter()
        encoder(images, keys)
        seconds.append(time.perf_counter() - began)
    return size / statistics.median(seconds[1:])


def _disk(
    manifest: Manifest, placements: Placements, num_images: int, has_posterior: bool
) -> dict[tuple[StoreKind, StoreDtype], float]:
    values = num_images * placements.encoded * placements.positions * manifest.latent_channels
    kinds = [kind for kind in TENSORS if has_posterior or kind == "mean"]
    return {
        (kind, dtype): values * len(tensor_names(kind, manifest.hflip)) * DTYPES[dtype].itemsize
        for kind in kinds
        for dtype in DTYPES
    }


def _free_bytes(folder: Path) -> int:
    """Of the disk that the folder would be on."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
