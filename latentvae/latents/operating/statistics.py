"""Statistics of a store's latents, exact, from the float64 sums in its commit records: no latents are read."""

import re
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from rich.console import Group, RenderableType
from rich.table import Table

from latentvae.errors import UserError
from latentvae.latents.reading.readable import ReadableStore
from latentvae.latents.store.files import read_index
from latentvae.latents.store.plan import Plan
from latentvae.latents.store.records import ChannelSums, CommitRecord, Counts, StoreKind, merge_sums

TOP_REASONS = 10


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviations (of the population) of raw latents; of one channel, or of all elements."""

    mean: float
    std: float  # of the values that are stored
    sample_std: float | None  # of samples of the posterior: Var(z) = Var(mean) + E[variance]; None without logvar
    minimum: float
    maximum: float

    @property
    def diffusion_std(self) -> float:
        """Of what a diffusion model is trained on: samples, where the store tells."""
        return self.std if self.sample_std is None else self.sample_std


@dataclass(frozen=True)
class StoreStatistics:
    """What a store holds. Mirrored images do not count."""

    store: str  # folder or URL
    encoder: str  # hash of the encoder that made it
    kind: StoreKind
    is_complete: bool
    units: int  # committed
    planned_units: int
    counts: Counts
    num_bytes: int  # of shards and indexes
    positions: int  # per channel: the sum of h * w over all latents
    channels: list[Spread]
    overall: Spread | None  # None where there are no latents
    buckets: dict[str, int]  # name -> images, the most frequent first
    reasons: dict[str, int]  # why images have no latents, numbers written as N -> images; the most frequent ones

    @property
    def scaling_factor(self) -> float:
        """One over the standard deviation over all elements (Rombach et al. 2022, LDM, appendix G).

        UserError where the latents are constant.
        """
        if self.overall is None or not self.overall.diffusion_std > 0:
            raise UserError(f"{self.store} holds no latents, or constant ones: they have no scale")
        return 1 / self.overall.diffusion_std

    @property
    def shift_factor(self) -> float:
        """The mean over all elements, which SD3's and FLUX's pipelines subtract first."""
        if self.overall is None:
            raise UserError(f"{self.store} holds no latents")
        return self.overall.mean

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON takes them, suggestions included where there are any."""
        values = asdict(self) | {"counts": self.counts.model_dump()}
        if self.overall is not None and self.overall.diffusion_std > 0:
            values |= {"scaling_factor": self.scaling_factor, "shift_factor": self.shift_factor}
        return values

    def table(self) -> RenderableType:
        """For a terminal."""
        state = "complete" if self.is_complete else f"{self.units} of {self.planned_units} units"
        parts: list[RenderableType] = [
            f"{self.store}: {state}; {self.counts.inputs} inputs, {self.counts.ok} with latents, {self.counts.error} "
            f"errors, {self.counts.skipped} skipped, {self.counts.rescued} rescued; {self.num_bytes / 1e6:.1f} MB"
        ]
        if self.overall is not None:
            parts.append(self._channel_table())
        if self.overall is not None and self.overall.diffusion_std > 0:
            parts.append(
                f"suggested: scaling_factor {self.scaling_factor:.6g} (1 / std), and shift_factor "
                f"{self.shift_factor:.6g} for families that have one"
            )
        for title, numbers in (("bucket", self.buckets), ("why there are no latents", self.reasons)):
            if numbers:
                table = Table(title, "images")
                for name, number in numbers.items():
                    table.add_row(name, f"{number}")
                parts.append(table)
        return Group(*parts)

    def _channel_table(self) -> Table:
        stored = {"moments": "mean", "mean": "mean", "sample": "sample"}[self.kind]
        table = Table("channel", f"mean of {stored}", f"std of {stored}", "std of samples", "min", "max")
        rows = [(str(number), spread) for number, spread in enumerate(self.channels)]
        for name, spread in [*rows, *([("all", self.overall)] if self.overall else [])]:
            figures = (spread.mean, spread.std, spread.sample_std, spread.minimum, spread.maximum)
            table.add_row(name, *("" if figure is None else f"{figure:.5g}" for figure in figures))
        return table


def store_statistics(store: str | Path) -> StoreStatistics:
    """Count and measure what is committed; a store that is not complete is measured as far as it is.

    store: folder or URL. Raises UserError where it is no store, is damaged, or holds nothing yet.
    """
    readable = ReadableStore(store, partial=True)
    records, planned = _records(readable)
    if not records:
        raise UserError(f"{store} holds nothing yet: run the same encode again")
    buckets: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    read_columns = partial(read_index, columns=["bucket", "status", "error"])
    for record in records:
        table = readable.files.use(record.index, record.files[record.index], read_columns)
        for pair in pc.value_counts(table["bucket"].drop_null()).to_pylist():
            buckets[pair["values"]] += pair["counts"]
        failed = table.filter(pc.not_equal(table["status"], "ok"))
        reasons.update(re.sub(r"\d+(\.\d+)?", "N", str(reason)) for reason in failed["error"].to_pylist())
    sums = merge_sums([record.channels for record in records])
    return StoreStatistics(
        store=readable.name,
        encoder=readable.manifest.vae.encoder,
        kind=readable.manifest.store,
        is_complete=readable.manifest.complete,
        units=len(records),
        planned_units=planned,
        counts=sum((record.counts for record in records), Counts()),
        num_bytes=sum(file.num_bytes for record in records for file in record.files.values()),
        positions=sums.count,
        channels=_spreads(sums) if sums.count else [],
        overall=_spreads(_over_channels(sums))[0] if sums.count else None,
        buckets=dict(buckets.most_common()),
        reasons=dict(reasons.most_common(TOP_REASONS)),
    )


def _records(readable: ReadableStore) -> tuple[list[CommitRecord], int]:
    """All there are, and the number of planned units."""
    with readable.files.small_files() as small:
        plan = Plan(small.plan_folder)
        found = [small.read_record(unit.bucket, unit.number) for unit in plan.units]
    records = [record for record in found if record is not None]
    for record in records:
        if {len(record.channels.total), len(record.channels.squares)} != {readable.manifest.latent_channels}:
            raise UserError(
                f"the commit record of unit {record.unit} of {readable.name} is damaged: run latentvae verify"
            )
    return records, len(found)


def _spreads(sums: ChannelSums) -> list[Spread]:
    """Of each channel, from its sums: Var(x) = E[x^2] - E[x]^2."""
    mean = np.array(sums.total) / sums.count
    variance = np.maximum(np.array(sums.squares) / sums.count - np.square(mean), 0)
    within = None if sums.variance is None else np.array(sums.variance) / sums.count
    return [
        Spread(
            mean=float(mean[channel]),
            std=float(np.sqrt(variance[channel])),
            sample_std=None if within is None else float(np.sqrt(variance[channel] + within[channel])),
            minimum=(sums.minimum or [])[channel],
            maximum=(sums.maximum or [])[channel],
        )
        for channel in range(len(mean))
    ]


def _over_channels(sums: ChannelSums) -> ChannelSums:
    """All channels as one."""
    return ChannelSums(
        count=sums.count * len(sums.total),
        total=[float(np.sum(sums.total))],
        squares=[float(np.sum(sums.squares))],
        variance=None if sums.variance is None else [float(np.sum(sums.variance))],
        minimum=None if sums.minimum is None else [min(sums.minimum)],
        maximum=None if sums.maximum is None else [max(sums.maximum)],
    )
