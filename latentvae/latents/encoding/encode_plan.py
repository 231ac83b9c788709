"""The plan of an encoding as it is told before it begins."""

import io
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from latentvae.latents.encoding.measure import Calibration
from latentvae.latents.encoding.placements import Placements, SizeSample
from latentvae.latents.encoding.settings import EncodeConfig
from latentvae.latents.store.records import DTYPES, Manifest, StoreDtype, StoreKind

SHOWN_BUCKETS = 12  # the commonest: the whole is to fit on a screen
BAR_WIDTH = 30  # characters of the longest bar
WIDTH, INDENT = 100, 13  # characters of a line, and of them before what it says


@dataclass(frozen=True)
class EncodePlan:
    """What `encode_dataset` would do with the same arguments."""

    source: str
    store: Path | None  # None: not said
    vae: str
    device: str
    config: EncodeConfig
    manifest: Manifest  # of the store, as it is begun
    num_images: int
    num_units: int
    images_left: int  # of the units that are not done
    units_left: int
    growth: list[str]  # how the source differs from a store that is there
    sizes: SizeSample
    placements: Placements
    disk: dict[tuple[StoreKind, StoreDtype], float]  # bytes of all latents, as if they were stored so
    index_bytes: float  # of indexes and plan, besides
    free_bytes: int
    calibration: Calibration
    timed_bucket: str
    batch_size: int  # in it
    images_per_second: float  # of one process, as fast as its reading and writing keep up

    @property
    def seconds(self) -> float:
        """For what is left, in one process."""
        return self.images_left * self.placements.encoded / self.images_per_second

    @property
    def disk_needed(self) -> float:
        """Bytes for what is left."""
        latents = self.disk[self.manifest.store, self.manifest.dtype]
        return (latents + self.index_bytes) * self.images_left / max(self.num_images, 1)

    def __str__(self) -> str:
        lines = [
            ("source", self._source()),
            ("vae", f"{self.vae}, encoder {self.manifest.vae.encoder[:12]}"),
            ("store", self._store()),
            ("settings", self._settings()),
            ("fingerprint", self.manifest.fingerprint),
            ("sizes", self._sizes()),
        ]
        unreadable = self.placements.unreadable
        rest = [
            ("cropped", f"{self.placements.cropped:.1%} of the images, {self.placements.area_lost:.1%} of the area"),
            ("small", self._small()),
            *([("unreadable", f"{unreadable:.1%} of the images")] if unreadable else []),
            *zip(["measured", "", ""], self.calibration.lines(), strict=False),
            ("time", self._time()),
            ("disk", self._disk()),
        ]
        return "\n".join([_rendered(_grid(lines)), self._buckets(), _rendered(_grid(rest)), self._disk_table()])

    def _source(self) -> str:
        return f"{self.source}: {self.num_images:,} images in {self.num_units:,} units"

    def _store(self) -> str:
        if self.store is None:
            return "a new one; nothing is written by this"
        if self.units_left == self.num_units and not self.growth:
            return f"{self.store} (nothing is done yet)"
        left = f"{self.store}: {self.images_left:,} images in {self.units_left:,} units are left"
        return "; ".join([left, *self.growth])

    def _settings(self) -> str:
        config, manifest = self.config, self.manifest
        batch = f"batches of {self.batch_size}" + (" (auto)" if config.batch_size == "auto" else "")
        parts = [
            f"{manifest.fields['buckets']}, {config.filter}, small: {config.small}",
            f"store {manifest.store} in {manifest.dtype}" + (" (auto)" if config.store == "auto" else ""),
            *(["mirrored too"] if config.hflip else []),
            f"encoder in {config.precision} on {self.device}",
            f"{batch}, units of {config.unit_images}, {config.num_workers} workers",
        ]
        return "; ".join(parts)

    def _sizes(self) -> str:
        seen = len(self.sizes.sizes)
        return f"of all {seen:,} images" if self.sizes.is_whole else f"of {seen:,} images, a sample by hash of the keys"

    def _small(self) -> str:
        found = self.placements
        shares = [(found.skipped, "left out"), (found.kept_small, "kept smaller"), (found.upscaled, "enlarged")]
        told = ", ".join(f"{share:.1%} {what}" for share, what in shares if share)
        return told or "none"

    def _time(self) -> str:
        return (
            f"{_figure(self.images_per_second)} images/s ({self.timed_bucket}, one process, where reading keeps up): "
            f"{_duration(self.seconds)} for what is left; N processes share it"
        )

    def _disk(self) -> str:
        enough = "" if self.disk_needed <= self.free_bytes else "; THAT IS TOO LITTLE"
        needed, free = _size(self.disk_needed), _size(self.free_bytes)
        return f"{needed} for what is left, with indexes; {free} are free{enough}"

    def _buckets(self) -> str:
        table = Table("bucket", "images", "", box=None, padding=(0, 2, 0, 0))
        table.columns[1].justify = "right"
        most = max(self.placements.buckets.values(), default=1.0)
        shown = list(self.placements.buckets.items())
        for name, share in shown[:SHOWN_BUCKETS]:
            bar = "█" * max(1, round(BAR_WIDTH * share / most))
            table.add_row(name, f"{round(share * self.num_images):,}", f"{bar} {share:.1%}")
        text = _rendered(table)
        more = shown[SHOWN_BUCKETS:]
        if more:
            share = sum(share for _, share in more)
            text += f"\nand {len(more)} more buckets: {round(share * self.num_images):,} images, {share:.1%}"
        return _indented(text)

    def _disk_table(self) -> str:
        table = Table("latents of all", *DTYPES, box=None, padding=(0, 2, 0, 0))
        for column in table.columns[1:]:
            column.justify = "right"
        for kind in dict.fromkeys(kind for kind, _ in self.disk):
            chosen = (self.manifest.store, self.manifest.dtype)
            cells = [_size(self.disk[kind, dtype]) + (" <-" if (kind, dtype) == chosen else "   ") for dtype in DTYPES]
            table.add_row(kind, *cells)
        return _indented(_rendered(table))


def _grid(lines: list[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(min_width=INDENT - 2)
    grid.add_column()
    for name, text in lines:
        grid.add_row(name, text)
    return grid


def _rendered(table: Table) -> str:
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, highlight=False, markup=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


def _indented(text: str) -> str:
    return "\n".join(" " * INDENT + line for line in text.splitlines())


def _size(num_bytes: float) -> str:
    units = ["B", "kB", "MB", "GB", "TB"]
    while num_bytes >= 1000 and len(units) > 1:
        num_bytes, units = num_bytes / 1000, units[1:]
    return f"{_figure(num_bytes)} {units[0]}"


def _duration(seconds: float) -> str:
    for length, name in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * length:
            return f"{_figure(seconds / length)} {name}"
    return f"{_figure(seconds)} seconds"


def _figure(value: float) -> str:
    """Three digits at least."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
