"""Images to a latent store: every input in exactly one row, resumable at any instant."""

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from latentvae.data.sources import ImageSource, open_source
from latentvae.data.workers import load_batches
from latentvae.errors import UserError, one_line
from latentvae.files import check_writable
from latentvae.images import PixelFormat
from latentvae.latents.encoder import LatentEncoder
from latentvae.latents.lock import ExclusiveLock
from latentvae.latents.preprocess import Piece, UnitImages
from latentvae.latents.records import TENSORS, CommitRecord, Counts, IndexRow
from latentvae.latents.resume import OpenedStore, open_store, require_empty
from latentvae.latents.settings import (
    EncodeConfig,
    bucket_of,
    environment,
    resolved_config,
    resolved_device,
    resolved_model,
)
from latentvae.latents.store import LatentStore, read_index
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.progress import ImageProgress

logger = logging.getLogger("latentvae")

NAMED_PROBLEMS = 20  # bad images that a report carries; all of them are in the index


@dataclass(frozen=True)
class EncodeReport:
    """What is in the store now, and what this run did for it."""

    store: Path
    counts: Counts  # of the whole store
    units: int
    units_encoded: int  # by this run; the others were there already
    images_encoded: int  # inputs read by this run
    num_bytes: int  # of all shards and indexes
    seconds: float
    problems: list[tuple[str, str]] = field(default_factory=list)  # (key, reason) of the first error rows
    notes: list[str] = field(default_factory=list)

    @property
    def images_per_second(self) -> float:
        """Of this run, from the first image to the last commit."""
        return self.images_encoded / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        lines = [
            f"{self.store}: {self.counts.ok} of {self.counts.inputs} images encoded, {self.counts.error} errors, "
            f"{self.counts.skipped} skipped, {self.counts.rescued} rescued in float32; {self.units} units, "
            f"{self.num_bytes / 1e6:.1f} MB",
            f"this run: {self.units_encoded} units, {self.images_encoded} images in {self.seconds:.1f} s "
            f"({self.images_per_second:.1f} images/s)",
        ]
        lines += [f"error: {key}: {reason}" for key, reason in self.problems]
        more = self.counts.error - len(self.problems)
        lines += [f"and {more} more errors, in the index files"] if more > 0 else []
        return "\n".join(lines + self.notes)


def encode_dataset(
    source: str | Path | object,
    vae: diffusers.AutoencoderKL | str | Path,
    out: str | Path,
    config: EncodeConfig | None = None,
    *,
    progress: bool = True,
    **options: Any,
) -> EncodeReport:
    """Encode every image of `source` into the latent store `out`, or continue an interrupted store.

    Args:
        source: a folder, `python:module:function`, or an object that yields {"key", "image"}.
        vae: a model, or whatever `load_model` takes. It is moved to the device.
        out: folder of the store; made if absent. Called again with the same arguments, it does what is left to do.
        config: all settings; `options` are its fields by name and win over it.
        progress: a bar on a terminal, log lines elsewhere.

    An image that cannot be read or encoded becomes an error row with the reason. Raises UserError in one line: an
    existing store made with other settings (naming the field), a store that another process is writing, a disk that
    is full (what is committed stays, and the run can be continued), and with `strict` any error row, at the end.
    """
    config = resolved_config(config, options)
    model = resolved_model(vae)
    name = str((vae if isinstance(vae, str | Path) else model.config.get("_name_or_path")) or "") or None
    pixels = config.pixels or PixelFormat(channels=model.config.in_channels)
    if pixels.channels != model.config.in_channels:
        raise UserError(f"images have {pixels.channels} channels, and the model takes {model.config.in_channels}")
    bucket = bucket_of(config, model)
    device = resolved_device(config.device)
    store = LatentStore(out)
    if store.folder.exists():
        require_empty(store)
    images = open_source(source, pixels, config.policy)

    check_writable(store.folder)
    was_training = model.training
    model.eval()
    try:
        with ExitStack() as stack:
            with _explained(store):
                lock = stack.enter_context(ExclusiveLock(store.lock_path))
                opened = open_store(store, images, model, name, bucket, pixels, config)
            began = time.monotonic()
            records, num_images = _encode_units(opened, lock, images, model, config, device, progress)
            with _explained(store):
                opened.finish(records)
            report = _report(opened, records, num_images, time.monotonic() - began)
    finally:
        model.train(was_training)
    if config.strict and report.counts.error:
        key, reason = report.problems[0]
        raise UserError(f"{report.counts.error} images could not be encoded (strict); the first is {key}: {reason}")
    return report


def _encode_units(
    opened: OpenedStore,
    lock: ExclusiveLock,
    images: ImageSource,
    model: AutoencoderKL,
    config: EncodeConfig,
    device: torch.device,
    progress: bool,
) -> tuple[list[CommitRecord], int]:
    """Encode and commit what is not done; returns the records of all units in order, and the inputs read here."""
    todo = [unit for unit in opened.plan.units if unit.number not in opened.records]
    total = opened.plan.num_images
    start = total - sum(len(unit.images) for unit in todo)
    if not todo:
        return [opened.records[unit.number] for unit in opened.plan.units], 0
    encoder = LatentEncoder(
        model,
        opened.pixels,
        batch_size=config.batch_size,
        precision=config.precision,
        store=config.store,
        dtype=config.dtype,
        seed=config.seed,
        device=device,
    )
    dataset = UnitImages(images, opened.positions, todo, opened.bucket, config.policy, config.filter, config.small)
    loader = load_batches(dataset, dataset.pieces(config.batch_size), Piece.of, config.num_workers)
    records = dict(opened.records)
    conditions = environment(config, device)
    opened.note_environment(conditions)
    with ImageProgress("encoding", total, start=start, enabled=progress) as bar:
        units = iter(todo)
        unit = UnitLatents(encoder)
        current = next(units)
        for piece in loader:
            unit.add(piece)
            bar.update(bar.done + len(piece.rows))
            if unit.num_inputs < len(current.images):
                continue
            tensors, rows = unit.result()
            lock.require_held()
            with _explained(opened.store, f"{len(records)} of {len(opened.plan.units)} units are committed; "):
                records[current.number] = opened.commit(current, tensors, rows, conditions)
            following = next(units, None)
            if following is None:
                break
            unit, current = UnitLatents(encoder), following
    return [records[unit.number] for unit in opened.plan.units], total - start


class UnitLatents:
    """Collects the inputs of one unit, encodes them in full batches, and gives the shard's tensors and index rows.

    Batches hold the readable images of the unit in its order, whatever pieces they come in: what a unit's files
    hold depends on the unit alone.
    """

    def __init__(self, encoder: LatentEncoder) -> None:
        self.encoder = encoder
        self.rows: list[IndexRow] = []
        self.waiting: list[tuple[int, Tensor]] = []  # position in rows, pixels (H, W, C)
        self.parts: list[dict[str, Tensor]] = []
        self.num_stored = 0

    @property
    def num_inputs(self) -> int:
        """Inputs added so far."""
        return len(self.rows)

    def add(self, piece: Piece) -> None:
        """The next inputs of the unit."""
        images = iter(piece.images)
        for row in piece.rows:
            if row.status == "ok":
                self.waiting.append((len(self.rows), next(images)))
            self.rows.append(row)
            if len(self.waiting) == self.encoder.batch_size:
                self._encode()

    def _encode(self) -> None:
        positions = [position for position, _ in self.waiting]
        pixels = torch.from_numpy(np.stack([image.numpy() for _, image in self.waiting]))  # (B, H, W, C)
        self.waiting = []
        batch = self.encoder(pixels, [self.rows[position].key for position in positions])
        self.parts.append(batch.tensors)
        for index, position in enumerate(positions):
            row = replace(self.rows[position], notes=batch.notes.get(index))
            if index in batch.problems:
                row = replace(row, status="error", error=batch.problems[index])
            else:
                row = replace(row, row=self.num_stored)
                self.num_stored += 1
            self.rows[position] = row

    def result(self) -> tuple[dict[str, Tensor], list[IndexRow]]:
        """Tensors (N, D, h, w) of the rows that are ok, and one row per input."""
        if self.waiting:
            self._encode()
        names = TENSORS[self.encoder.store]
        if not self.parts:
            return {}, self.rows
        return {name: torch.cat([part[name] for part in self.parts]) for name in names}, self.rows


def _report(opened: OpenedStore, records: list[CommitRecord], num_images: int, seconds: float) -> EncodeReport:
    counts = sum((record.counts for record in records), Counts())
    problems: list[tuple[str, str]] = []
    for record in records:
        if record.counts.error and len(problems) < NAMED_PROBLEMS:
            index = read_index(opened.store.paths(record.bucket, record.unit)[1], ["key", "status", "error"])
            problems += [(row["key"], row["error"]) for row in index.to_pylist() if row["status"] == "error"]
    return EncodeReport(
        store=opened.store.folder,
        counts=counts,
        units=len(records),
        units_encoded=len(records) - len(opened.records),
        images_encoded=num_images,
        num_bytes=sum(file.num_bytes for record in records for file in record.files.values()),
        seconds=seconds,
        problems=problems[:NAMED_PROBLEMS],
        notes=opened.notes,
    )


@contextmanager
def _explained(store: LatentStore, state: str = "") -> Iterator[None]:
    """Turn what the disk says (full, read-only, no permission) into one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise UserError(
            f"cannot write to {store.folder}: {reason}; {state}mend that and run the same command again"
        ) from error
