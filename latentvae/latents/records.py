"""What the files of a latent store hold: index rows, commit records, the manifest, exact channel sums."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import torch
from pydantic import BaseModel
from torch import Tensor

SCHEMA = 1

StoreKind = Literal["moments", "mean", "sample"]
StoreDtype = Literal["fp16", "bf16", "fp32"]
DTYPES: dict[StoreDtype, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TENSORS: dict[StoreKind, tuple[str, ...]] = {"moments": ("mean", "logvar"), "mean": ("mean",), "sample": ("sample",)}

INDEX = pa.schema(
    [
        ("key", pa.string()),
        ("variant", pa.string()),  # "" in a store of one crop per image; (key, variant) is unique
        ("row", pa.int32()),  # in the shard, -1 where there are no latents
        ("status", pa.string()),  # ok, error, skipped
        ("error", pa.string()),  # the reason, where the status is not ok
        ("source_hash", pa.string()),  # sha256:<file bytes>, or pixels-sha256:<decoded pixels>
        ("width", pa.int32()),  # of the original, after EXIF orientation; pixels, as all that follow
        ("height", pa.int32()),
        ("scaled_width", pa.int32()),
        ("scaled_height", pa.int32()),
        ("crop_top", pa.int32()),  # in the scaled image; the bucket is the size of the crop
        ("crop_left", pa.int32()),
        ("flip", pa.bool_()),
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
    flip: bool = False
    notes: str | None = None
    variant: str = ""


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
    """Float64 sums over a shard's stored values, per channel: exact statistics of the store are their sums."""

    count: int  # latent positions, N * h * w
    total: list[float]
    squares: list[float]
    variance: list[float] | None  # of exp(logvar), where logvar is stored
    minimum: list[float] | None  # None where there is no row
    maximum: list[float] | None


class FileRecord(BaseModel, extra="forbid", frozen=True):
    """What a committed file must be."""

    sha256: str
    num_bytes: int


class CommitRecord(BaseModel, extra="forbid", frozen=True):
    """Written last: the unit is done, and this is what its two files hold."""

    schema_version: int = SCHEMA
    unit: int
    bucket: str
    fingerprint: str
    fields: dict[str, Any]  # the fingerprint's fields, so that a stray shard can say what differs
    files: dict[str, FileRecord]
    counts: Counts
    channels: ChannelSums
    environment: dict[str, Any]  # batch size, threads, device, versions: they change the last bits


class VAERecord(BaseModel, extra="forbid", frozen=True):
    """The autoencoder of a store. `config` holds the scaling; it is not in the fingerprint, for the store is raw."""

    name: str | None
    encoder: str
    decoders: list[str]  # hashes; the first is the one the store was begun with
    config: dict[str, Any]


class Manifest(BaseModel, extra="forbid", frozen=True):
    """manifest.json."""

    schema_version: int = SCHEMA
    kind: Literal["latentvae store"] = "latentvae store"
    complete: bool = False
    fingerprint: str
    fields: dict[str, Any]
    store: StoreKind
    dtype: StoreDtype
    latent_channels: int
    buckets: list[Bucket]
    vae: VAERecord
    source: str
    plan: dict[str, FileRecord] = {}  # plan file -> what it must be
    totals: Counts | None = None  # of all units, when complete
    statistics: ChannelSums | None = None

    @property
    def bytes_per_row(self) -> int:
        """Of the largest bucket."""
        cells = max(bucket.latent_width * bucket.latent_height for bucket in self.buckets)
        return len(TENSORS[self.store]) * self.latent_channels * cells * DTYPES[self.dtype].itemsize


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
