"""A store opened for reading: what it holds, checked once, and its shards mapped as they are needed."""

import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from latentvae.autoencoders.adapter import load_autoencoder
from latentvae.autoencoders.interface import ImageAutoencoder
from latentvae.data.storage import is_url
from latentvae.errors import UserError
from latentvae.latents.reading.access import LocalFiles, StoreFiles
from latentvae.latents.reading.remote import RemoteFiles
from latentvae.latents.store.files import LatentStore, Shard, open_shard, read_index
from latentvae.latents.store.fingerprint import fingerprint, require_same
from latentvae.latents.store.plan import Plan
from latentvae.latents.store.records import CommitRecord, FileRecord, Manifest
from latentvae.model.scaling import LatentScaling

MAX_OPEN_SHARDS = 512  # maps per process; the kernel allows 65,530 by default
DOWNLOADS = 8  # at once, while a remote store is opened

Autoencoder = ImageAutoencoder | str | os.PathLike[str] | Any  # what load_autoencoder takes


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One shard of a unit."""

    unit: int
    bucket: str
    name: str
    file: FileRecord


@dataclass(frozen=True, slots=True)
class UnitFiles:
    """What a reader keeps of a commit record."""

    number: int
    index: str
    index_file: FileRecord
    shards: range  # in ReadableStore.shards
    num_latents: int


class ReadableStore:
    """The manifest, the committed units and the shards of a store. Picklable: another process maps shards for itself.

    Args:
        store: folder, or a URL (`s3://`, `hf://`, `https://`, ...).
        partial: take what is committed of a store that is not complete.
        vae: the autoencoder that will decode; refused where its encoder is not the one that made the store.
        cache_dir, max_cache_bytes: see `RemoteFiles`; for URLs only.

    Raises UserError where the store is absent, incomplete, damaged, or mixed from several.
    """

    def __init__(
        self,
        store: str | Path,
        *,
        partial: bool = False,
        vae: Autoencoder | None = None,
        cache_dir: str | Path | None = None,
        max_cache_bytes: int | None = None,
    ) -> None:
        self.files = _open_files(store, cache_dir, max_cache_bytes)
        self.name = self.files.name
        self.units: list[UnitFiles] = []
        self.shards: list[ShardFile] = []
        self._open: OrderedDict[int, Shard] = OrderedDict()
        with self.files.small_files() as small:
            self.manifest = small.read_manifest()
            self._check_manifest(vae)
            self._read_records(small, partial)
        self.scaling = LatentScaling.from_dict(self.manifest.vae.scaling)

    def _check_manifest(self, vae: Autoencoder | None) -> None:
        manifest = self.manifest
        if fingerprint(manifest.fields) != manifest.fingerprint:
            raise UserError(f"{self.name}/manifest.json is damaged: its fingerprint does not belong to its fields")
        if vae is not None:
            there, here = {"encoder": manifest.vae.encoder}, {"encoder": load_autoencoder(vae).encoder_hash}
            require_same(there, here, self.name, "pass the VAE that made it, or encode again")

    def _read_records(self, small: LatentStore, partial: bool) -> None:
        plan, missing = Plan(small.plan_folder), 0
        for unit in plan.units:
            record = small.read_record(unit.bucket, unit.number)
            if record is None:
                missing += 1
            else:
                self._add(record)
        if (missing or not self.manifest.complete) and not partial:
            raise UserError(
                f"{self.name} is not complete ({missing} of {len(plan.units)} units are to be encoded): "
                "run encode again to finish it, or pass partial=True"
            )

    def _add(self, record: CommitRecord) -> None:
        what = f"unit {record.unit} of {self.name}"
        if record.fields != self.manifest.fields:  # naming what differs takes a while
            advice = "it is not of this store: encode again in another --out"
            require_same(record.fields, self.manifest.fields, what, advice)
        first = len(self.shards)
        try:
            self.shards += [
                ShardFile(record.unit, bucket, name, record.files[name]) for bucket, name in record.shards.items()
            ]
            index_file = record.files[record.index]
        except KeyError as error:
            raise UserError(f"the commit record of {what} is damaged: {error} is not among its files") from error
        shards = range(first, len(self.shards))
        self.units.append(UnitFiles(record.unit, record.index, index_file, shards, record.counts.ok))

    def index(self, unit: UnitFiles, columns: list[str] | None = None) -> pa.Table:
        """The rows of a unit that have latents. UserError where the file is gone or damaged."""
        table = self.files.use(unit.index, unit.index_file, lambda path: read_index(path, columns))
        return table.filter(pc.greater_equal(table["row"], 0))

    def indexes(self, columns: list[str] | None = None) -> list[pa.Table]:
        """Of all units, in their order."""
        if isinstance(self.files, LocalFiles):
            return [self.index(unit, columns) for unit in self.units]
        with ThreadPoolExecutor(DOWNLOADS) as pool:
            return list(pool.map(lambda unit: self.index(unit, columns), self.units))

    def shard(self, number: int) -> Shard:
        """A shard by its place in `shards`, mapped on its first use in this process."""
        shard = self._open.get(number)
        if shard is not None:
            self._open.move_to_end(number)
            return shard
        shard = self._open[number] = self._mapped(self.shards[number])
        if len(self._open) > MAX_OPEN_SHARDS:
            self._open.popitem(last=False)
        return shard

    def _mapped(self, place: ShardFile) -> Shard:
        shard = self.files.use(place.name, place.file, open_shard)
        if (shard.fingerprint, shard.unit, shard.bucket) != (self.manifest.fingerprint, place.unit, place.bucket):
            what = f"{self.name}/{place.name}"
            raise UserError(f"{what} is not the shard of unit {place.unit} of this store: run latentvae verify")
        return shard

    def close(self) -> None:
        """Release the memory maps (Windows keeps mapped files from being replaced); reading opens them again."""
        self._open.clear()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}


def latent_shape(manifest: Manifest, scaling: LatentScaling, bucket: str, normalize: bool) -> tuple[int, int, int]:
    """(D, h, w) of the items of a bucket, as they are read: normalized latents may be patches."""
    known = manifest.buckets[0]
    width, height = bucket_size(bucket)
    factor, patch = known.width // known.latent_width, scaling.patch if normalize else 1
    return (
        manifest.latent_channels * patch**2,
        height // factor // patch,
        width // factor // patch,
    )


def bucket_size(name: str) -> tuple[int, int]:
    """(width, height) in pixels, of a bucket's name."""
    width, height = name.split("x")
    return int(width), int(height)


def _open_files(store: str | Path, cache_dir: str | Path | None, max_cache_bytes: int | None) -> StoreFiles:
    if isinstance(store, str) and is_url(store):
        return RemoteFiles(store, cache_dir, max_cache_bytes)
    if cache_dir is not None or max_cache_bytes is not None:
        raise UserError(f"{store} is a local folder and is read in place: cache_dir and max_cache_bytes are for URLs")
    return LocalFiles(store)
