"""From rows of an index to items: latents sampled, mirrored and normalized, sizes, and what joins them by key."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from latentvae.errors import UserError
from latentvae.latents.reading.draws import KeyedNormals, is_mirrored, item_digests
from latentvae.latents.reading.joins import Joins
from latentvae.latents.reading.readable import ReadableStore, UnitFiles, bucket_size, latent_shape
from latentvae.latents.store.records import FLIPPED, TENSORS, Manifest

COLUMNS = ["key", "bucket", "row", "width", "height", "scaled_width", "crop_top", "crop_left"]
CHUNK = 32_767  # numbers worked on at once: they stay in a core's cache, and torch starts no threads for so few

OWN_FIELDS = ["latents", "key", "original_size", "crop_top_left", "target_size", "is_mirrored"]  # of LatentItem

PosteriorMode = Literal["mode", "sample"]


class LatentItem(TypedDict):
    """One image's latents, and under their names its caption, fields and arrays, where they were asked for.

    Sizes are (height, width) and (top, left), as SDXL's conditioning takes them.
    """

    latents: Tensor  # (D, h, w) float32
    key: str
    original_size: tuple[int, int]  # pixels, after EXIF orientation
    crop_top_left: tuple[int, int]  # pixels in the scaled image (mirrored, where the latents are)
    target_size: tuple[int, int]  # pixels, of the bucket
    is_mirrored: NotRequired[bool]  # with hflip=True
    caption: NotRequired[str]  # "" where there is none


@dataclass(frozen=True)
class Rows:
    """Images that have latents, as columns: a million take about 100 MB."""

    keys: pa.LargeStringArray
    shard: np.ndarray  # (n,) int32, in ReadableStore.shards
    row: np.ndarray  # (n,) int32, in the shard
    sizes: np.ndarray  # (n, 7) int32: original height, width; crop top, left; target height, width; left when mirrored

    def __len__(self) -> int:
        return len(self.row)


def picked(parts: Sequence[tuple[Rows, int]]) -> Rows:
    """One row out of each, (n,) in their order."""
    keys = pa.array([rows.keys[place].as_py() for rows, place in parts], pa.large_string())
    shard, row = (
        np.array([getattr(rows, name)[place] for rows, place in parts], np.int32) for name in ("shard", "row")
    )
    return Rows(keys, shard, row, np.stack([rows.sizes[place] for rows, place in parts]))


def rows_of(store: ReadableStore, units: Sequence[UnitFiles], tables: Sequence[pa.Table]) -> Rows:
    """Of index tables with at least COLUMNS, one per unit."""
    shard = np.zeros(sum(map(len, tables)), np.int32)
    start = 0
    for unit, table in zip(units, tables, strict=True):
        numbers = {store.shards[number].bucket: number for number in unit.shards}
        names = table["bucket"].combine_chunks().dictionary_encode()
        unknown = set(names.dictionary.to_pylist()) - numbers.keys()
        if unknown:
            raise UserError(
                f"unit {unit.number} of {store.name} is damaged: its index names a bucket {unknown.pop()!r}"
            )
        of_name = np.array([numbers[name] for name in names.dictionary.to_pylist()], np.int32)
        shard[start : start + len(table)] = of_name[names.indices.to_numpy()] if len(table) else 0
        start += len(table)
    table = pa.concat_tables([table.select(COLUMNS) for table in tables])
    row, width, height, scaled, top, left = (table[name].to_numpy().astype(np.int32) for name in COLUMNS[2:])
    used = np.unique(shard)
    targets = np.zeros((len(store.shards), 2), np.int32)
    for number in used.tolist():
        targets[number] = bucket_size(store.shards[number].bucket)
    wide, high = targets[shard].T
    sizes = np.stack([height, width, top, left, high, wide, scaled - left - wide], axis=1)
    return Rows(table["key"].cast(pa.large_string()).combine_chunks(), shard, row, sizes)


@dataclass(frozen=True)
class ReadOptions:
    """How latents are read; see LatentDataset."""

    posterior: PosteriorMode
    normalize: bool
    seed: int
    hflip: bool

    def check(self, manifest: Manifest, where: str) -> None:
        """UserError where the store does not hold what is asked for."""
        if self.posterior not in ("mode", "sample"):
            raise UserError(f'posterior is {self.posterior!r}; it must be "mode" or "sample"')
        if manifest.store == "mean" and self.posterior == "sample":
            raise UserError(f'{where} holds the mean alone and cannot be sampled: pass posterior="mode"')
        if manifest.store == "sample" and self.posterior == "mode":
            raise UserError(f'{where} holds one sample per image and not its mode: pass posterior="sample"')
        if self.hflip and not manifest.hflip:
            raise UserError(f"{where} holds no mirrored latents: encode with --hflip, or pass hflip=False")


class ItemReader:
    """Reads batches of items of one store. Picklable."""

    def __init__(self, store: ReadableStore, options: ReadOptions, joins: Joins) -> None:
        options.check(store.manifest, store.name)
        self.store, self.options, self.joins = store, options, joins
        self._normals = KeyedNormals()
        self._is_drawn = options.posterior == "sample" and store.manifest.store == "moments"

    @property
    def fields(self) -> list[str]:
        """Names of the fields of every item."""
        return [*(OWN_FIELDS if self.options.hflip else OWN_FIELDS[:-1]), *self.joins.names]

    def shape(self, shard: int) -> tuple[int, int, int]:
        """(D, h, w) of the items of a shard, by its place in ReadableStore.shards."""
        bucket = self.store.shards[shard].bucket
        return latent_shape(self.store.manifest, self.store.scaling, bucket, self.options.normalize)

    def read(self, rows: Rows, places: np.ndarray, epoch: int) -> list[LatentItem]:
        """The items at `places` (n,) of `rows`, in that order."""
        keys = rows.keys.take(pa.array(places)).to_pylist()
        hflip = self.options.hflip
        digests = item_digests(keys, self.options.seed, epoch) if self._is_drawn or hflip else []
        mirrored = is_mirrored(digests).tolist() if hflip else [False] * len(keys)
        latents = self._latents(rows.shard[places].tolist(), rows.row[places].tolist(), digests, mirrored)
        sizes = rows.sizes[places].tolist()
        items: list[dict[str, Any]] = [
            {
                "latents": latent,
                "key": key,
                "original_size": (height, width),
                "crop_top_left": (top, flipped_left if flip else left),
                "target_size": (high, wide),
            }
            for latent, key, flip, (height, width, top, left, high, wide, flipped_left) in zip(
                latents, keys, mirrored, sizes, strict=True
            )
        ]
        if hflip:
            for item, flip in zip(items, mirrored, strict=True):
                item["is_mirrored"] = flip
        if self.joins.names:
            for item, joined in zip(items, self.joins.get(keys), strict=True):
                item.update(joined)
        return cast(list[LatentItem], items)

    def _latents(self, shards: list[int], rows: list[int], digests: list[bytes], mirrored: list[bool]) -> list[Tensor]:
        """Of each item, (D, h, w) float32."""
        names = TENSORS[self.store.manifest.store]
        shape_of = {number: self.store.shard(number).tensors[names[0]].shape[1:] for number in set(shards)}
        groups: dict[torch.Size, list[int]] = {}
        for place, number in enumerate(shards):
            groups.setdefault(shape_of[number], []).append(place)
        latents: list[Tensor] = [torch.empty(0)] * len(shards)
        for shape, members in groups.items():
            step = min(len(members), max(1, CHUNK // shape.numel()))
            # the same memory for every chunk: fresh pages of large blocks cost more than the arithmetic
            values, logvar, noise = (torch.empty((step, *shape)) for _ in range(3))
            for start in range(0, len(members), step):
                chunk = members[start : start + step]
                where = [(shards[place], rows[place], mirrored[place]) for place in chunk]
                found = self._gather(names[0], where, values[: len(chunk)])
                if self._is_drawn:
                    deviation = self._gather(names[1], where, logvar[: len(chunk)])
                    self._draw(found, deviation, noise[: len(chunk)], [digests[place] for place in chunk])
                found = self.store.scaling.normalize(found) if self.options.normalize else found.clone()
                for place, latent in zip(chunk, found, strict=True):
                    latents[place] = latent
        return latents

    def _gather(self, name: str, where: list[tuple[int, int, bool]], out: Tensor) -> Tensor:
        """Copy rows of shards to `out`, (n, D, h, w) float32, from the stored dtype."""
        for target, (shard, row, flip) in zip(out, where, strict=True):
            target.copy_(self.store.shard(shard).tensors[name + FLIPPED if flip else name][row])
        return out

    def _draw(self, mean: Tensor, logvar: Tensor, noise: Tensor, digests: list[bytes]) -> None:
        """mean += exp(logvar / 2) * noise, in place; on one thread NumPy's functions are the faster ones."""
        values, deviation, drawn = (tensor.view(len(digests), -1).numpy() for tensor in (mean, logvar, noise))
        self._normals.fill(digests, drawn)
        deviation *= np.float32(0.5)
        np.exp(deviation, out=deviation)
        drawn *= deviation
        values += drawn
