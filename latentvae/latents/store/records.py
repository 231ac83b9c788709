"""What the files of a latent store hold: index rows, commit records, the manifest, exact channel sums."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import torch
from pydantic import BaseModel
from torch import Tensor

SCHEMA = 2

StoreKind = Literal["moments", "mean", "sample"]
StoreDtype = Literal["fp16", "bf16", "fp32"]
DTYPES: dict[StoreDtype, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TENSORS: dict[StoreKind, tuple[str, ...]] = {"moments": ("mean", "logvar"), "mean": ("mean",), "sample": ("sample",)}
FLIPPED = "_hflip"  # ends the names of the tensors of the mirrored images
MIXED = "mixed"  # home of units whose images were not probed: each goes into the bucket that its size asks for

INDEX = pa.schema(
    [
        ("key", pa.string()),
        ("variant", pa.string()),  # "" in a store of one crop per image; (key, variant) is unique
        ("bucket", pa.string()),  # whose shard holds it; null where there are no latents
        ("row", pa.int32()),  # in that shard, -1 where there are no latents
        ("status", pa.string()),  # ok, error, skipped
        ("error", pa.string()),  # the reason, where the status is not ok
        ("source_hash", pa.string()),  # sha256:<file bytes>, or pixels-sha256:<decoded pixels>
        ("width", pa.int32()),  # of the original, after EXIF orientation; pixels, as all that follow
        ("height", pa.int32()),
        ("scaled_width", pa.int32()),
        ("scaled_height", pa.int32()),
        ("crop_top", pa.int32()),  # in the scaled image; the bucket is the size of the crop
        ("crop_left", pa.int32()),
        ("notes", pa.string()),
    ]
)
Status = Literal["ok", "error", "skipped"]


@dataclass(frozen=True)
class IndexRow:
    """One input of a unit; the fields are the columns of INDEX."""

    key: str
    row: int
    status: Status
    error: str | None = None
    source_hash: str | None = None
    width: int | None = None
    height: int | None = None
    scaled_width: int | None = None
    scaled_height: int | None = None
    crop_top: int | None = None
    crop_left: int | None = None
    notes: str | None = None
    variant: str = ""
    bucket: str | None = None


class Bucket(BaseModel, extra="forbid", frozen=True):
    """One size of image, and of its latents."""

    width: int
    height: int
    latent_width: int
    latent_height: int

    @property
    def name(self) -> str:
        """The folder of its shards."""
        return f"{self.width}x{self.height}"


class Counts(BaseModel, extra="forbid", frozen=True):
    """Inputs by what became of them; inputs = ok + error + skipped. Rescued ones are among ok."""

    inputs: int = 0
    ok: int = 0
    error: int = 0
    skipped: int = 0
    rescued: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        mine, theirs = self.model_dump(), other.model_dump()
        return Counts(**{name: mine[name] + theirs[name] for name in mine})

    @classmethod
    def of(cls, rows: Sequence[IndexRow]) -> Self:
        """Count the rows of a unit."""
        status = [row.status for row in rows]
        numbers = {name: status.count(name) for name in ("ok", "error", "skipped")}
        return cls(inputs=len(rows), rescued=sum(r.notes is not None and r.row >= 0 for r in rows), **numbers)


class ChannelSums(BaseModel, extra="forbid", frozen=True):
    """Float64 sums over the stored values (without the mirrored ones), per channel: a store's are the sums of them."""

    count: int  # latent positions, the sum of N * h * w
    total: list[float]
    squares: list[float]
    variance: list[float] | None  # of exp(logvar), where logvar is stored
    minimum: list[float] | None  # None where there is no row
    maximum: list[float] | None

    @classmethod
    def empty(cls, channels: int, store: StoreKind) -> Self:
        """Of no latents."""
        zeros = [0.0] * channels
        variance = zeros if store == "moments" else None
        return cls(count=0, total=zeros, squares=zeros, variance=variance, minimum=None, maximum=None)


class FileRecord(BaseModel, extra="forbid", frozen=True):
    """What a committed file must be."""

    sha256: str
    num_bytes: int


class CommitRecord(BaseModel, extra="forbid", frozen=True):
    """Written last: the unit is done, and this is what its files hold."""

    schema_version: int = SCHEMA
    unit: int
    bucket: str  # the unit's home: where its record and index lie
    fingerprint: str
    fields: dict[str, Any]  # the fingerprint's fields, so that a stray shard can say what differs
    index: str  # path of the index in the store, "/" between folders
    shards: dict[str, str]  # bucket -> path of its shard; a unit without latents has none
    files: dict[str, FileRecord]  # path -> what the file is; of the index and of every shard
    counts: Counts
    channels: ChannelSums
    environment: dict[str, Any]  # batch size, threads, device, versions: they change the last bits


class VAERecord(BaseModel, extra="forbid", frozen=True):
    """The autoencoder of a store. `config` and `scaling` are not in the fingerprint, for the store is raw."""

    name: str | None
    class_name: str
    encoder: str
    decoders: list[str]  # hashes; the first is the one the store was begun with
    config: dict[str, Any]
    scaling: dict[str, Any]  # LatentScaling.to_dict()
    subfolder: str | None = None  # with which `name` was loaded, as are the next two
    revision: str | None = None
    variant: str | None = None

    @property
    def load_options(self) -> dict[str, str | None]:
        """As `load_autoencoder` takes them beside `name`."""
        return {"subfolder": self.subfolder, "revision": self.revision, "variant": self.variant}


class Manifest(BaseModel, extra="forbid", frozen=True):
    """manifest.json."""

    schema_version: int = SCHEMA
    kind: Literal["latentvae store"] = "latentvae store"
    complete: bool = False
    fingerprint: str
    fields: dict[str, Any]
    store: StoreKind
    dtype: StoreDtype
    hflip: bool
    latent_channels: int
    buckets: list[Bucket]  # of the rule; `--small keep` makes others besides, which the records name
    batch_sizes: dict[str, int] = {}  # bucket -> images per forward, where they were measured
    vae: VAERecord
    source: str
    source_options: dict[str, Any] = {}  # of `open_source`, where they were given
    plan: dict[str, FileRecord] = {}  # plan file -> what it must be
    totals: Counts | None = None  # of all units, when complete
    statistics: ChannelSums | None = None

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors in every shard."""
        return tensor_names(self.store, self.hflip)

    def bytes_per_row(self, bucket: Bucket) -> int:
        """Of one image's latents."""
        return row_bytes(bucket, self.latent_channels, self.store, self.dtype, self.hflip)


def unit_name(unit: int) -> str:
    """With which the names of a unit's files, and of its lease, begin."""
    return f"u{unit:06d}"


def tensor_names(store: StoreKind, hflip: bool) -> tuple[str, ...]:
    """Of a shard: those of the images, then those of the mirrored images."""
    names = TENSORS[store]
    return names + tuple(name + FLIPPED for name in names) if hflip else names


def row_bytes(bucket: Bucket, channels: int, store: StoreKind, dtype: StoreDtype, hflip: bool) -> int:
    """Of one image's latents in a shard, with those of the mirrored image."""
    values = channels * bucket.latent_width * bucket.latent_height
    return len(tensor_names(store, hflip)) * values * DTYPES[dtype].itemsize


def channel_sums(tensors: Mapping[str, Tensor]) -> ChannelSums:
    """Sums of the stored mean (or sample), and of the variance where logvar is stored; values (N, C, h, w)."""
    values = tensors.get("mean", tensors.get("sample"))
    assert values is not None
    rows, channels = values.shape[:2]
    total, squares, variance = (np.zeros(channels) for _ in range(3))
    for row in range(rows):  # row by row: flat memory, and an order of summation that depends on nothing
        numbers = values[row].double().flatten(1).numpy()  # (C, h*w)
        total += numbers.sum(1)
        squares += np.square(numbers).sum(1)
        if "logvar" in tensors:
            variance += np.exp(tensors["logvar"][row].double().flatten(1).numpy()).sum(1)
    return ChannelSums(
        count=rows * values[0:1].shape[2:].numel(),
        total=total.tolist(),
        squares=squares.tolist(),
        variance=variance.tolist() if "logvar" in tensors else None,
        minimum=values.amin((0, 2, 3)).tolist() if rows else None,
        maximum=values.amax((0, 2, 3)).tolist() if rows else None,
    )


def merge_sums(parts: Sequence[ChannelSums]) -> ChannelSums:
    """The sums of several shards, in the order given."""
    minima = [part.minimum for part in parts if part.minimum is not None]
    maxima = [part.maximum for part in parts if part.maximum is not None]

    def added(name: str) -> list[float]:
        return np.sum([getattr(part, name) for part in parts], axis=0).tolist()

    return ChannelSums(
        count=sum(part.count for part in parts),
        total=added("total"),
        squares=added("squares"),
        variance=added("variance") if all(part.variance is not None for part in parts) else None,
        minimum=np.min(minima, axis=0).tolist() if minima else None,
        maximum=np.max(maxima, axis=0).tolist() if maxima else None,
    )
