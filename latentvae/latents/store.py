"""The latent store on disk: its names, its manifest, and the atomic commit and reading of one shard.

    store/
      manifest.json                       what the store is (Manifest)
      plan/plan-0000.parquet              which image is in which unit (plan.py)
      shards/256x256/u000123.safetensors  latents of one unit, raw: mean, logvar (N, C, h, w), or mean, or sample
      shards/256x256/u000123.parquet      one row per input of the unit, errors included (INDEX)
      shards/256x256/u000123.json         commit record, written last (CommitRecord)

A unit is done when its commit record is there and carries the store's fingerprint. Nothing here holds a time or a
process number, so equal work gives equal bytes.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from latentvae.errors import UserError, one_line
from latentvae.files import atomic_file, canonical_json, sha256_file, write_json
from latentvae.latents.records import (
    INDEX,
    SCHEMA,
    CommitRecord,
    Counts,
    FileRecord,
    IndexRow,
    Manifest,
    channel_sums,
)

CHECKSUM = "checksum"  # the last field of manifest and commit records
HEADER = "latentvae"  # the one metadata entry of a shard: with several, their order in the file would be random


class LatentStore:
    """Paths and single-file operations of one store folder; it need not exist yet."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest_path = self.folder / "manifest.json"
        self.plan_folder = self.folder / "plan"
        self.shards = self.folder / "shards"
        self.lock_path = self.folder / "encode.lock"

    def paths(self, bucket: str, unit: int) -> tuple[Path, Path, Path]:
        """Latents, index and commit record of a unit."""
        stem = self.shards / bucket / f"u{unit:06d}"
        return stem.with_suffix(".safetensors"), stem.with_suffix(".parquet"), stem.with_suffix(".json")

    def read_manifest(self) -> Manifest:
        """Raises UserError where this is no store, or one of a schema that this version does not read."""
        try:
            values = json.loads(self.manifest_path.read_bytes())
        except FileNotFoundError as error:
            raise UserError(f"{self.folder} is not a latent store: it has no manifest.json") from error
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self.manifest_path}: {error}") from error
        version = values.get("schema_version") if isinstance(values, dict) else None
        if version != SCHEMA:
            raise UserError(f"{self.manifest_path} has schema {version}; this version of latentvae reads {SCHEMA}")
        try:
            values.pop(CHECKSUM, None)
            manifest = Manifest.model_validate(values)
        except ValidationError as error:
            raise UserError(f"{self.manifest_path} is damaged: {_first_problem(error)}") from error
        return manifest

    def write_manifest(self, manifest: Manifest) -> None:
        """Atomically."""
        write_json(self.manifest_path, _sealed(manifest.model_dump()))

    def read_record(self, bucket: str, unit: int) -> CommitRecord | None:
        """None where the unit is not committed; UserError where the record is not readable."""
        path = self.paths(bucket, unit)[2]
        try:
            values = json.loads(path.read_bytes())
            if isinstance(values, dict):
                values.pop(CHECKSUM, None)
            return CommitRecord.model_validate(values)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"cannot read the commit record {path}: {error.strerror or error}") from error
        except ValidationError as error:
            raise UserError(f"commit record {path} is damaged: {_first_problem(error)}") from error
        except ValueError as error:
            raise UserError(f"commit record {path} is damaged: {error}") from error

    def commit(
        self,
        bucket: str,
        unit: int,
        tensors: Mapping[str, Tensor],
        rows: Sequence[IndexRow],
        fields: Mapping[str, Any],
        fingerprint: str,
        environment: Mapping[str, Any],
    ) -> CommitRecord:
        """Write latents (N, C, h, w), then the index, then the record; each file is whole or absent.

        Raises OSError where the disk does not take it (full, read-only); the unit is then not committed.
        """
        data, index, record_path = self.paths(bucket, unit)
        header = canonical_json({"schema_version": SCHEMA, "fingerprint": fingerprint, "unit": unit}).decode()
        files = {}
        with atomic_file(data) as temporary:
            # not save_file: its own temporary file would outlive a kill, and only its owner could read the result
            temporary.write_bytes(save(dict(tensors), metadata={HEADER: header}))
            files[data.name] = file_record(temporary)
        with atomic_file(index) as temporary:
            pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], schema=INDEX), temporary)
            files[index.name] = file_record(temporary)
        record = CommitRecord(
            unit=unit,
            bucket=bucket,
            fingerprint=fingerprint,
            fields=dict(fields),
            files=files,
            counts=Counts.of(rows),
            channels=channel_sums(tensors),
            environment=dict(environment),
        )
        write_json(record_path, _sealed(record.model_dump()))
        return record


def read_index(path: Path, columns: list[str] | None = None) -> pa.Table:
    """The index of one unit; UserError where the file is damaged or of another schema."""
    try:
        table = pq.read_table(path, columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read the index {path}: {one_line(error)}") from error
    if columns is None and not table.schema.equals(INDEX):
        raise UserError(f"the index {path} does not have the columns of schema {SCHEMA}")
    return table


@dataclass(frozen=True)
class Shard:
    """The latents of one unit, memory-mapped: reading a row touches that row only."""

    tensors: dict[str, Tensor]  # (N, C, h, w) in the stored dtype
    fingerprint: str
    unit: int


def open_shard(path: Path) -> Shard:
    """Map a shard; UserError where it is absent, damaged, or not ours."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[HEADER])
            names = file.keys()  # the file itself cannot be iterated
            tensors = {name: file.get_tensor(name) for name in names}
            return Shard(tensors, header["fingerprint"], header["unit"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"cannot read the shard {path}: {type(error).__name__} {error}") from error


def file_record(path: Path) -> FileRecord:
    """What a file is now."""
    return FileRecord(sha256=sha256_file(path), num_bytes=path.stat().st_size)


def _sealed(values: dict[str, Any]) -> dict[str, Any]:
    """With the sha256 of all other fields, for the files that no other file has the hash of."""
    return values | {CHECKSUM: hashlib.sha256(canonical_json(values)).hexdigest()}


def is_sealed(path: Path) -> bool:
    """Whether a manifest or commit record is, byte for byte, as it was written."""
    data = path.read_bytes()
    try:
        values = json.loads(data)
        given = {name: value for name, value in values.items() if name != CHECKSUM}
        return data == (json.dumps(_sealed(given), indent=2) + "\n").encode()  # as write_json
    except (ValueError, AttributeError):
        return False


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"


def content_hash(source: Path | np.ndarray) -> str:
    """The source hash of an index row: of a file's bytes, or of decoded pixels where there is no file."""
    if isinstance(source, Path):
        return f"sha256:{sha256_file(source)}"
    digest = hashlib.sha256(f"{source.dtype.str}{source.shape}".encode())
    digest.update(np.ascontiguousarray(source).tobytes())
    return f"pixels-sha256:{digest.hexdigest()}"
