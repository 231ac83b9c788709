"""Images to a latent store: every input in exactly one row, resumable at any instant, by any number of processes."""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from latentvae.autoencoders.adapter import load_autoencoder
from latentvae.data.sources import open_source
from latentvae.errors import UserError
from latentvae.files import check_writable
from latentvae.latents.encoding.encoder import LatentEncoder
from latentvae.latents.encoding.engine import UnitEncoder, Waits, Work, encode_here, explained
from latentvae.latents.encoding.launch import Launch
from latentvae.latents.encoding.measure import measured_batch_sizes, measured_kind
from latentvae.latents.encoding.opened import OpenedStore, require_empty, require_local, require_outside
from latentvae.latents.encoding.preprocess import UnitImages
from latentvae.latents.encoding.ray_engine import encode_on_ray
from latentvae.latents.encoding.resume import join_store, open_store
from latentvae.latents.encoding.settings import EncodeConfig, Task, environment, pixels_of, resolved_config, rule_of
from latentvae.latents.store.files import LatentStore
from latentvae.latents.store.lease import Leases
from latentvae.latents.store.records import CommitRecord, Counts, StoreKind

logger = logging.getLogger("latentvae")

NAMED_PROBLEMS = 20  # bad images that a report carries; all of them are in the index


@dataclass(frozen=True)
class EncodeReport:
    """What is in the store now, and what this run did for it."""

    store: Path
    counts: Counts  # of the whole store
    units: int
    units_encoded: int  # by this process; the others were there already, or came from other processes
    images_encoded: int  # inputs read by this process
    num_bytes: int  # of all shards and indexes
    seconds: float
    waits: Waits
    problems: list[tuple[str, str]] = field(default_factory=list)  # (key, reason) of the first error rows
    notes: list[str] = field(default_factory=list)

    @property
    def images_per_second(self) -> float:
        """Of this process, from the first image to the last commit."""
        return self.images_encoded / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        lines = [
            f"{self.store}: {self.counts.ok} of {self.counts.inputs} images encoded, {self.counts.error} errors, "
            f"{self.counts.skipped} skipped, {self.counts.rescued} rescued in float32; {self.units} units, "
            f"{self.num_bytes / 1e6:.1f} MB",
            f"this run: {self.units_encoded} units, {self.images_encoded} images in {self.seconds:.1f} s "
            f"({self.images_per_second:.1f} images/s)",
        ]
        lines += [str(self.waits)] if self.images_encoded else []
        lines += [f"error: {key}: {reason}" for key, reason in self.problems]
        more = self.counts.error - len(self.problems)
        lines += [f"and {more} more errors, in the index files"] if more > 0 else []
        return "\n".join(lines + self.notes)


def encode_dataset(
    source: str | Path | object,
    vae: Any,
    out: str | Path,
    config: EncodeConfig | None = None,
    *,
    progress: bool = True,
    **options: Any,
) -> EncodeReport:
    """Encode every image of `source` into the latent store `out`, or continue an interrupted store.

    Any number of processes may do so at once, started together (`accelerate launch`, `torchrun`) or not: each takes the
    units that no other one works on, and returns when all are done.

    Args:
        source: whatever `open_source` takes: a folder, a list, tar or Parquet files, a dataset, a Python object.
        vae: a model, or whatever `load_autoencoder` takes. It is moved to the device.
        out: folder of the store; made if absent. Called again with the same arguments, it does what is left to do.
        config: all settings; `options` are its fields by name and win over it.
        progress: a bar on a terminal, log lines elsewhere.

    An image that cannot be read or encoded becomes an error row with the reason. Raises UserError in one line: an
    existing store made with other settings (naming the field), a disk that is full (what is committed stays, and the
    run can be continued), and with `strict` any error row, at the end.
    """
    config = resolved_config(config, options)
    launch = Launch.current(config.device)
    job = EncodeJob.prepare(source, vae, out, config, launch)
    was_training = job.vae.module.training
    job.vae.module.eval()
    try:
        return job.run(progress)
    finally:
        job.vae.module.train(was_training)


@dataclass
class EncodeJob(Task):
    """Everything that one process needs to encode."""

    launch: Launch
    given: object  # the source as it was given

    @classmethod
    def prepare(cls, source: object, vae: Any, out: str | Path, config: EncodeConfig, launch: Launch) -> "EncodeJob":
        """Resolve everything that can be refused before the work begins, and make the store's folder."""
        job = cls.resolve(source, vae, LatentStore(out), config, launch)
        check_writable(job.store.folder)
        return job

    @classmethod
    def resolve(cls, source: object, vae: Any, store: LatentStore, config: EncodeConfig, launch: Launch) -> "EncodeJob":
        """Without writing anything."""
        autoencoder = load_autoencoder(vae, **config.load_options)
        rule, pixels = rule_of(config, autoencoder), pixels_of(config, autoencoder)
        require_local(store)
        if store.folder.exists():
            require_empty(store)
        images = open_source(source, pixels, config.policy, **config.source_options)
        if images.is_sequential:
            require_outside(store, source)
        return cls(images, autoencoder, store, rule, pixels, config, launch, source)

    def run(self, progress: bool) -> EncodeReport:
        """Open the store, encode until every unit is done, and report."""
        with ExitStack() as stack:
            with explained(self.store):
                leases = Leases(self.store.leases, self.config.lease_seconds)
                stack.callback(leases.close)
                opened = self.open(leases)
            began = time.monotonic()
            work, records = Work(), None
            encode = self._engine(opened, work)
            while records is None:  # another process may find more to do: new or edited images
                encode(progress and self.launch.is_main)
                with explained(self.store):
                    records = opened.finish()
            report = self._report(opened, records, work, time.monotonic() - began)
        if self.config.strict and report.counts.error and self.launch.is_main:
            key, reason = report.problems[0]
            raise UserError(f"{report.counts.error} images could not be encoded (strict); the first is {key}: {reason}")
        return report

    def open(self, leases: Leases) -> OpenedStore:
        """The first process of a launch plans; the others wait for it."""
        if not self.launch.is_main:
            self.launch.wait()
            return join_store(self, leases)
        opened = open_store(self, leases, measures=self)
        self.launch.wait()
        return opened

    def packed(self) -> "EncodeJob":
        """To be sent to another process: without a listing that it does not need, and off the device."""
        source = self.source
        if isinstance(self.given, str | Path):
            source = open_source(self.given, self.pixels, self.config.policy, **self.config.source_options)
        return replace(self, source=source, vae=self.vae.to("cpu"))

    def join(self, leases: Leases, launch: Launch) -> UnitEncoder:
        """In the process that it was sent to, when the store was opened."""
        job = replace(self, launch=launch)
        return job.unit_encoder(join_store(job, leases))

    def kind(self) -> StoreKind:
        """What of the posterior is worth keeping: measured on some of the images."""
        return measured_kind(self.unit_images(), self.latent_encoder("moments"), self.config.num_workers)

    def batch_sizes(self, limits: Mapping[str, int]) -> dict[str, int]:
        """Measured images per forward of each bucket in `limits`, not above its limit."""
        return measured_batch_sizes(self.latent_encoder("mean"), self.rule.buckets, limits)

    def unit_encoder(self, opened: OpenedStore) -> UnitEncoder:
        """What encodes single units of the opened store."""
        conditions = environment(self.config, self.launch.device)
        opened.note_environment(conditions)
        encoder = self.latent_encoder(opened.manifest.store, opened.manifest.batch_sizes)
        return UnitEncoder(opened, encoder, self.unit_images(), self.config.num_workers, conditions)

    def unit_images(self) -> UnitImages:
        """What the worker processes run."""
        return UnitImages(self.source, self.rule, self.config.policy, self.config.filter)

    def latent_encoder(self, kind: StoreKind, batch_sizes: Mapping[str, int] | None = None) -> LatentEncoder:
        """Of this process, for a store of that kind."""
        return LatentEncoder(
            self.vae,
            self.pixels,
            batch_size=1 if self.config.batch_size == "auto" else self.config.batch_size,
            batch_sizes=batch_sizes if self.config.batch_size == "auto" else None,
            precision=self.config.precision,
            store=kind,
            dtype=self.config.dtype,
            hflip=self.config.hflip,
            seed=self.config.seed,
            device=self.launch.device,
        )

    def _engine(self, opened: OpenedStore, work: Work) -> Callable[[bool], None]:
        """What encodes until all is done, and adds to `work` what it did; it takes whether to show progress."""
        if self.config.engine == "ray":
            return partial(encode_on_ray, self, opened, work)
        encoder = self.unit_encoder(opened)
        encoder.work = work
        return partial(encode_here, encoder, self.launch)

    def _report(self, opened: OpenedStore, records: list[CommitRecord], work: Work, seconds: float) -> EncodeReport:
        problems: list[tuple[str, str]] = []
        for record in records:
            if record.counts.error and len(problems) < NAMED_PROBLEMS:
                index = opened.store.read_unit_index(record, ["key", "status", "error"])
                problems += [(row["key"], row["error"]) for row in index.to_pylist() if row["status"] == "error"]
        return EncodeReport(
            store=opened.store.folder,
            counts=sum((record.counts for record in records), Counts()),
            units=len(records),
            units_encoded=work.num_units,
            images_encoded=work.num_images,
            num_bytes=sum(file.num_bytes for record in records for file in record.files.values()),
            seconds=seconds,
            waits=work.waits,
            problems=problems[:NAMED_PROBLEMS],
            notes=opened.notes,
        )
