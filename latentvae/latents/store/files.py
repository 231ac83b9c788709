"""The latent store on disk: its names, its manifest, and the atomic commit and reading of one unit.

    store/
      manifest.json                                what the store is (Manifest)
      plan/plan-0000.parquet                       which image is in which unit (plan.py)
      shards/256x256/u000123-0a1b2c3d.safetensors  latents of one unit and bucket, raw: mean, logvar (N, C, h, w), ...
      shards/256x256/u000123-0a1b2c3d.parquet      one row per input of the unit, errors included (INDEX)
      shards/256x256/u000123.json                  commit record of the unit, written last (CommitRecord)

A unit is done when its commit record is there and carries the store's fingerprint. The eight hex digits are of the hash
of what the unit holds: two that encode the same unit cannot mix their files, and a reader that knows an older state
of the unit never reads rows of a newer one. Nothing here holds a time or a process number, so equal work gives equal
bytes.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
from latentvae.files import canonical_json, fsync, rename_new, sha256_file, temporary_path, write_json
from latentvae.latents.store.records import (
    INDEX,
    SCHEMA,
    ChannelSums,
    CommitRecord,
    Counts,
    FileRecord,
    IndexRow,
    Manifest,
    channel_sums,
    merge_sums,
    unit_name,
)

CHECKSUM = "checksum"  # the last field of manifest and commit records
MENDED = "remove it and run encode again, which makes that unit anew"
HEADER = "latentvae"  # the one metadata entry of a shard: with several, their order in the file would be random


class LatentStore:
    """Paths and single-file operations of one store folder; it need not exist yet."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest_path = self.folder / "manifest.json"
        self.plan_folder = self.folder / "plan"
        self.shards = self.folder / "shards"
        self.leases = self.folder / "leases"

    def record_path(self, bucket: str, unit: int) -> Path:
        """Of the commit record of a unit, whose home is `bucket`."""
        return self.shards / bucket / f"{unit_name(unit)}.json"

    def relative(self, path: Path) -> str:
        """As commit records and messages name a file."""
        return path.relative_to(self.folder).as_posix()

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
        """Atomically. Only who holds the plan's lease writes it."""
        write_json(self.manifest_path, _sealed(manifest.model_dump()))

    def read_record(self, bucket: str, unit: int) -> CommitRecord | None:
        """None where the unit is not committed; UserError where the record is not readable."""
        path = self.record_path(bucket, unit)
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
            raise UserError(f"commit record {path} is damaged: {_first_problem(error)}; {MENDED}") from error
        except ValueError as error:
            raise UserError(f"commit record {path} is damaged: {error}; {MENDED}") from error

    def read_unit_index(self, record: CommitRecord, columns: list[str] | None = None) -> pa.Table:
        """The index rows of a committed unit."""
        return read_index(self.folder / record.index, columns)


@dataclass(frozen=True)
class UnitContent:
    """What is to be committed of a unit."""

    unit: int
    bucket: str  # the unit's home
    tensors: Mapping[str, Mapping[str, Tensor]]  # bucket -> tensor name -> (N, C, h, w), N > 0
    rows: Sequence[IndexRow]


def write_unit(
    store: LatentStore, manifest: Manifest, content: UnitContent, environment: Mapping[str, Any], *, owner: str
) -> "UncommittedUnit":
    """Write shards and index, and the record under a temporary name: `publish` makes the unit done.

    `owner`: of the lease, in temporary names. Raises OSError where the disk does not take it (full, read-only).
    """
    header = {"schema_version": SCHEMA, "fingerprint": manifest.fingerprint, "unit": content.unit}
    stem = unit_name(content.unit)
    home = store.shards / content.bucket
    written: dict[tuple[str, str], Path] = {}  # (bucket, suffix) -> temporary file
    try:
        for bucket, tensors in content.tensors.items():
            target = store.shards / bucket / f"{stem}.safetensors"
            target.parent.mkdir(parents=True, exist_ok=True)
            written[bucket, target.suffix] = temporary = temporary_path(target, owner)
            # not save_file: its own temporary file would outlive a kill, and only its owner could read the result
            metadata = {HEADER: canonical_json(header | {"bucket": bucket}).decode()}
            temporary.write_bytes(save(dict(tensors), metadata=metadata))
        home.mkdir(parents=True, exist_ok=True)
        written[content.bucket, ".parquet"] = temporary = temporary_path(home / f"{stem}.parquet", owner)
        pq.write_table(pa.Table.from_pylist([asdict(row) for row in content.rows], schema=INDEX), temporary)
        found = {place: file_record(path) for place, path in written.items()}
        digest = hashlib.sha256("".join(found[place].sha256 for place in sorted(found)).encode()).hexdigest()
        files, paths = {}, {}
        for (bucket, suffix), temporary in written.items():
            fsync(temporary)
            paths[bucket, suffix] = final = store.shards / bucket / f"{stem}-{digest[:8]}{suffix}"
            temporary.replace(final)  # where it exists, it has the same bytes
            files[store.relative(final)] = found[bucket, suffix]
            fsync(final.parent)
    finally:
        for temporary in written.values():
            temporary.unlink(missing_ok=True)
    sums = [channel_sums(tensors) for tensors in content.tensors.values()]
    record = CommitRecord(
        unit=content.unit,
        bucket=content.bucket,
        fingerprint=manifest.fingerprint,
        fields=manifest.fields,
        index=store.relative(paths[content.bucket, ".parquet"]),
        shards={bucket: store.relative(paths[bucket, ".safetensors"]) for bucket in content.tensors},
        files=files,
        counts=Counts.of(content.rows),
        channels=merge_sums(sums) if sums else ChannelSums.empty(manifest.latent_channels, manifest.store),
        environment=dict(environment),
    )
    temporary = temporary_path(store.record_path(content.bucket, content.unit), owner)
    write_json(temporary, _sealed(record.model_dump()))
    return UncommittedUnit(store, record, temporary)


@dataclass(frozen=True)
class UncommittedUnit:
    """All files of a unit are there but its record, which waits under a temporary name."""

    store: LatentStore
    record: CommitRecord
    temporary: Path

    def publish(self) -> bool:
        """Make the unit done; False where another process was first: its record stays, and our files go."""
        path = self.store.record_path(self.record.bucket, self.record.unit)
        try:
            if rename_new(self.temporary, path):
                fsync(path.parent)
                return True
        finally:
            self.temporary.unlink(missing_ok=True)
        self.discard()
        return False

    def discard(self) -> None:
        """Remove the files, but for those that a record names."""
        self.temporary.unlink(missing_ok=True)
        winner = self.store.read_record(self.record.bucket, self.record.unit)
        for name in self.record.files.keys() - (winner.files.keys() if winner else set()):
            with suppress(OSError):
                (self.store.folder / name).unlink()


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
    """The latents of one unit and bucket, memory-mapped: reading a row touches that row only."""

    tensors: dict[str, Tensor]  # (N, C, h, w) in the stored dtype
    fingerprint: str
    unit: int
    bucket: str


def open_shard(path: Path) -> Shard:
    """Map a shard; UserError where it is absent, damaged, or not ours."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[HEADER])
            names = file.keys()  # the file itself cannot be iterated
            tensors = {name: file.get_tensor(name) for name in names}
            return Shard(tensors, header["fingerprint"], header["unit"], header["bucket"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"cannot read the shard {path}: {type(error).__name__} {error}") from error


def file_record(path: Path) -> FileRecord:
    """Hash and size of a file."""
    return FileRecord(sha256=sha256_file(path), num_bytes=path.stat().st_size)


def _sealed(values: dict[str, Any]) -> dict[str, Any]:
    """With a checksum: the sha256 of all other fields, for the files that no other file has the hash of."""
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


def content_hash(content: bytes | np.ndarray) -> str:
    """The source hash of an index row: of an image's encoded bytes, or of its pixels where there are none."""
    if isinstance(content, bytes):
        return f"sha256:{hashlib.sha256(content).hexdigest()}"
    digest = hashlib.sha256(f"{content.dtype.str}{content.shape}".encode())
    digest.update(np.ascontiguousarray(content).tobytes())
    return f"pixels-sha256:{digest.hexdigest()}"
