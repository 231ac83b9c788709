"""Some rows of a store made again from their images, with the recorded settings, and compared with what is stored."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentvae.autoencoders.adapter import ImageAutoencoder
from latentvae.data.sources import open_source
from latentvae.errors import UserError
from latentvae.latents.encoding.encoder import LatentEncoder, Precision
from latentvae.latents.encoding.launch import Launch
from latentvae.latents.encoding.preprocess import UnitImages
from latentvae.latents.encoding.settings import EncodeConfig, rule_of
from latentvae.latents.operating.recorded import recorded_autoencoder, recorded_config, recorded_pixels, require_encoder
from latentvae.latents.store.files import LatentStore, open_shard
from latentvae.latents.store.plan import Plan
from latentvae.latents.store.records import DTYPES, CommitRecord, IndexRow, Manifest
from latentvae.progress import ImageProgress

# What other machines, batches and library versions may change, |difference| / |latents| of a row, besides the rounding
# of what is stored: float32 sums in another order, and reduced precisions whose every layer rounds (with a pretrained
# tiny autoencoder on photographs bf16 differs from float32 by up to 2e-2). Latents of another image differ by about 1.
ARITHMETIC: dict[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}
GEOMETRY = ("bucket", "width", "height", "scaled_width", "scaled_height", "crop_top", "crop_left")


@dataclass(frozen=True)
class DeepReport:
    """How far the rows that were encoded again lie from what is stored."""

    num_rows: int  # that could be compared
    identical: int  # of these, bit for bit
    max_difference: float  # over all stored numbers of these rows
    rms_difference: float
    rounding: float  # rms of the rounding error of the stored type, for comparison
    tolerance: float  # |difference| / |stored| of a row
    problems: dict[int, list[str]] = field(default_factory=dict)  # unit -> rows that are not what they should be
    unavailable: list[str] = field(default_factory=list)  # images that are gone or edited: no fault of the store

    def __str__(self) -> str:
        failed = sum(map(len, self.problems.values())) + len(self.unavailable)
        return (
            f"deep: {self.num_rows} rows encoded again, {self.identical} identical, {failed} problems; difference at "
            f"most {self.max_difference:.3g}, rms {self.rms_difference:.3g} ({self._in_roundings():.3g} times the "
            f"rounding of what is stored); {self.tolerance:.1e} of a row's norm is allowed"
        )

    def _in_roundings(self) -> float:
        return self.rms_difference / self.rounding if self.rounding else 0.0


@dataclass(frozen=True)
class _Chosen:
    record: CommitRecord
    position: int  # in the unit
    row: IndexRow


def check_deep(
    store: LatentStore,
    manifest: Manifest,
    plan: Plan,
    records: Sequence[CommitRecord],
    number: int,
    *,
    vae: Any = None,
    source: Any = None,
    device: str | None = None,
    progress: bool = True,
) -> DeepReport:
    """Encode `number` rows again, chosen by the fingerprint, the same ones at every call; fewer where there are fewer.

    Each image must still be the one that was encoded (its hash), go into the same place of the same bucket, and give
    the stored numbers but for rounding: of the stored type, and of the arithmetic, which another machine may order
    differently. Latents of two rows that changed places differ by far more.

    Raises UserError where source or VAE cannot be opened, or the VAE's encoder is another one.
    """
    model = recorded_autoencoder(manifest, store.folder, vae)
    require_encoder(manifest.vae.encoder, store.folder, model)
    config = recorded_config(manifest, store.folder, model)
    try:
        where, options = (manifest.source, manifest.source_options) if source is None else (source, {})
        images = open_source(where, recorded_pixels(manifest), config.policy, **options)
    except UserError as error:
        if source is not None:
            raise
        raise UserError(f"{store.folder} was made from {manifest.source}: {error}; pass --source") from error
    rule = rule_of(config, model)
    preparation = UnitImages(images, rule, config.policy, config.filter)
    chosen = _choose(store, records, number, manifest.fingerprint)
    measure = _Measure(DTYPES[manifest.dtype], config.precision)
    was_training = model.module.training
    model.module.eval()
    try:
        with ImageProgress("encoding again", len(chosen), enabled=progress) as bar:
            done = 0
            for record, group in _by_unit(chosen):
                encoder = _encoder(model, manifest, config, record, device)
                _compare_unit(store, plan, preparation, encoder, record, group, measure)
                done += len(group)
                bar.update(done)
    finally:
        model.module.train(was_training)
    return measure.report()


def _choose(store: LatentStore, records: Sequence[CommitRecord], number: int, fingerprint: str) -> list[_Chosen]:
    """Rows of one bucket after the other, and of another unit each time as long as there are any."""
    generator = np.random.default_rng(int(fingerprint[:16], 16))
    order = [records[place] for place in generator.permutation(len(records))]
    queues = {
        bucket: deque(record for record in order if bucket in record.shards)
        for bucket in sorted({bucket for record in records for bucket in record.shards})
    }
    left: dict[tuple[int, str], list[_Chosen]] = {}  # rows of a unit and bucket, shuffled
    chosen: list[_Chosen] = []
    while queues and len(chosen) < number:
        for bucket in list(queues):
            record = queues[bucket].popleft()
            place = record.unit, bucket
            if place not in left:
                rows = [IndexRow(**row) for row in store.read_unit_index(record).to_pylist()]
                there = [_Chosen(record, position, row) for position, row in enumerate(rows) if row.bucket == bucket]
                left[place] = [there[index] for index in generator.permutation(len(there))]
            if left[place] and len(chosen) < number:
                chosen.append(left[place].pop())
            if left[place]:
                queues[bucket].append(record)
            if not queues[bucket]:
                del queues[bucket]
    return chosen


def _by_unit(chosen: Sequence[_Chosen]) -> Iterator[tuple[CommitRecord, list[_Chosen]]]:
    units: dict[int, list[_Chosen]] = {}
    for one in chosen:
        units.setdefault(one.record.unit, []).append(one)
    for number in sorted(units):
        group = sorted(units[number], key=lambda one: one.position)
        yield group[0].record, group


def _encoder(
    model: ImageAutoencoder, manifest: Manifest, config: EncodeConfig, record: CommitRecord, device: str | None
) -> LatentEncoder:
    """With the batch size of the unit: it changes the last bits."""
    size = record.environment.get("batch_size")
    return LatentEncoder(
        model,
        recorded_pixels(manifest),
        batch_size=size if isinstance(size, int) else 1,
        batch_sizes=manifest.batch_sizes if size == "auto" else None,
        precision=config.precision,
        store=manifest.store,
        dtype=manifest.dtype,
        hflip=manifest.hflip,
        seed=config.seed,
        device=Launch.current(device).device,
    )


def _compare_unit(
    store: LatentStore,
    plan: Plan,
    preparation: UnitImages,
    encoder: LatentEncoder,
    record: CommitRecord,
    group: Sequence[_Chosen],
    measure: "_Measure",
) -> None:
    planned = plan.images(record.unit)
    prepared = preparation.__getitems__([planned[one.position] for one in group])
    for bucket in record.shards:
        usable: list[tuple[_Chosen, Tensor]] = []
        for one, again in zip(group, prepared, strict=True):
            if one.row.bucket != bucket:
                continue
            missing, moved = _missing(one.row, again.row), _moved(one.row, again.row)
            if missing is not None or again.image is None:
                measure.unavailable.append(measure.line(one, missing or "it gives no pixels"))
            elif moved is not None:
                measure.fail(one, moved)
            else:
                usable.append((one, torch.from_numpy(again.image)))
        if not usable:
            continue
        encoded = encoder(torch.stack([image for _, image in usable]), [one.row.key for one, _ in usable])
        shard = open_shard(store.folder / record.shards[bucket])
        place = 0
        for index, (one, _) in enumerate(usable):
            if index in encoded.problems:
                measure.fail(one, f"encoded again: {encoded.problems[index]}")
                continue
            stored = {name: tensor[one.row.row] for name, tensor in shard.tensors.items()}
            measure.compare(one, stored, {name: tensor[place] for name, tensor in encoded.tensors.items()})
            place += 1


def _missing(stored: IndexRow, again: IndexRow) -> str | None:
    if again.source_hash is None:
        return f"it cannot be read any more: {again.error}"
    if again.source_hash != stored.source_hash:
        return "the image was edited since it was encoded (run encode again)"
    if again.status != "ok":
        return f"it cannot be encoded any more: {again.error}"
    return None


def _moved(stored: IndexRow, again: IndexRow) -> str | None:
    for name in GEOMETRY:
        before, now = getattr(stored, name), getattr(again, name)
        if before != now:
            return f"its {name} is {now} now, and {before} in the index"
    return None


class _Measure:
    """Adds up differences over rows."""

    def __init__(self, dtype: torch.dtype, precision: Precision) -> None:
        self.dtype = dtype
        self.tolerance = torch.finfo(dtype).eps + ARITHMETIC[precision]
        self.problems: dict[int, list[str]] = {}
        self.unavailable: list[str] = []
        self.num_rows = self.identical = self.num_values = 0
        self.largest = self.squares = self.rounding_squares = 0.0

    def line(self, one: _Chosen, problem: str) -> str:
        """Which row, and what of it."""
        return f"{one.record.index}: {one.row.key}: {problem}"

    def fail(self, one: _Chosen, problem: str) -> None:
        """Note what is wrong with a row."""
        self.problems.setdefault(one.record.unit, []).append(self.line(one, problem))

    def compare(self, one: _Chosen, stored: dict[str, Tensor], again: dict[str, Tensor]) -> None:
        """Every tensor of one row, both as stored."""
        self.num_rows += 1
        is_identical = True
        for name, tensor in stored.items():
            old, new = tensor.double(), again[name].double()
            difference = (new - old).abs()
            norm = old.square().mean().sqrt().item()
            error = difference.square().mean().sqrt().item()
            self.largest = max(self.largest, difference.max().item())
            self.squares += difference.square().sum().item()
            # rounding to nearest is off by up to half a step, evenly spread: rms step / sqrt(12)
            step = torch.finfo(self.dtype).eps * torch.exp2(torch.floor(torch.log2(old.abs().clamp(min=2.0**-14))))
            self.rounding_squares += (step.square().sum() / 12).item()
            self.num_values += old.numel()
            is_identical &= torch.equal(tensor, again[name])
            if not error <= self.tolerance * max(norm, torch.finfo(torch.float16).tiny):  # NaN is not either
                share = error / norm if norm else float("inf")
                self.fail(one, f"encoded again, its {name} differs by {share:.2g} of its norm")
        self.identical += is_identical

    def report(self) -> DeepReport:
        """Of everything so far."""
        count = max(self.num_values, 1)
        return DeepReport(
            num_rows=self.num_rows,
            identical=self.identical,
            max_difference=self.largest,
            rms_difference=(self.squares / count) ** 0.5,
            rounding=(self.rounding_squares / count) ** 0.5,
            tolerance=self.tolerance,
            problems=self.problems,
            unavailable=self.unavailable,
        )
