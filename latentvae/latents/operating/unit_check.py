"""Is one committed unit whole? Its record, and the index and shards that the record names."""

import hashlib
import re
from collections.abc import Iterator, Sequence

import pyarrow as pa

from latentvae.errors import UserError
from latentvae.files import sha256_file
from latentvae.latents.store.files import LatentStore, is_sealed, open_shard, read_index
from latentvae.latents.store.fingerprint import differences, fingerprint
from latentvae.latents.store.records import DTYPES, MIXED, Bucket, CommitRecord, Counts, IndexRow, Manifest, unit_name

SIZE = re.compile(r"([1-9]\d*)x([1-9]\d*)")  # name of a bucket


def unit_problems(
    store: LatentStore,
    manifest: Manifest,
    unit: int,
    home: str,
    record: CommitRecord,
    keys: Sequence[str] | None,
    *,
    full: bool,
) -> Iterator[str]:
    """What is wrong with one committed unit, one line each, which names the file.

    keys: of the plan, in order; None where the plan is damaged. full: hash the shards too, not the index alone.
    """
    path = store.record_path(home, unit)
    name = store.relative(path)
    if (record.unit, record.bucket) != (unit, home):
        yield f"{name}: it is the record of unit {record.unit} in {record.bucket}"
        return
    if not is_sealed(path):
        yield f"{name}: its bytes are not those that were written"
    for phrase in differences(record.fields, manifest.fields):
        yield f"{name}: made with other settings: {phrase}"
    if record.fingerprint != fingerprint(record.fields):
        yield f"{name}: its fingerprint does not belong to its fields"
    misnamed = _misnamed(record)
    if misnamed is not None:
        yield f"{name}: {misnamed}"
        return
    damaged: set[str] = set()
    for file, expected in record.files.items():
        problem = _file_problem(
            store, file, expected.num_bytes, expected.sha256 if full or file == record.index else None
        )
        if problem is not None:
            damaged.add(file)
            yield f"{file}: {problem}"
    rows: list[IndexRow] | None = None
    if record.index not in damaged:
        try:
            rows = _index_rows(read_index(store.folder / record.index))
        except UserError as error:
            yield str(error)
    if rows is not None:
        for problem in _index_problems(manifest, record, rows, keys):
            yield f"{record.index}: {problem}"
    positions = 0
    for bucket, file in record.shards.items():
        if file not in damaged:
            for problem in _shard_problems(store, manifest, record, bucket, rows):
                yield f"{file}: {problem}"
        if rows is not None:
            positions += sum(row.bucket == bucket for row in rows) * _cells(manifest, bucket)
    if rows is not None and positions != record.channels.count:
        yield f"{name}: its sums are over {record.channels.count} latent positions, the index has {positions}"


def _misnamed(record: CommitRecord) -> str | None:
    """The names of a unit's files follow from where it is and, in eight hex digits, from what they hold."""
    places = {(bucket, ".safetensors"): path for bucket, path in record.shards.items()}
    places[record.bucket, ".parquet"] = record.index
    if set(record.files) != set(places.values()):
        return f"it names the files {sorted(record.files)}, and as index and shards {sorted(places.values())}"
    hashes = "".join(record.files[places[place]].sha256 for place in sorted(places))
    generation = hashlib.sha256(hashes.encode()).hexdigest()[:8]
    for (bucket, suffix), path in places.items():
        if not (SIZE.fullmatch(bucket) or (bucket == MIXED and suffix == ".parquet")):
            return f"{bucket!r} is no bucket"
        if path != f"shards/{bucket}/{unit_name(record.unit)}-{generation}{suffix}":
            return f"it names {path}, which is not what a file of that content is called"
    return None


def _file_problem(store: LatentStore, name: str, num_bytes: int, sha256: str | None) -> str | None:
    path = store.folder / name
    try:
        found = path.stat().st_size
        if found != num_bytes:
            return f"{found} bytes, {num_bytes} were committed"
        if sha256 is not None and sha256_file(path) != sha256:
            return "its bytes are not those that were committed"
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return None


def _index_rows(table: pa.Table) -> list[IndexRow]:
    return [IndexRow(**row) for row in table.to_pylist()]


def _index_problems(
    manifest: Manifest, record: CommitRecord, rows: list[IndexRow], keys: Sequence[str] | None
) -> Iterator[str]:
    if keys is not None and [row.key for row in rows] != list(keys):
        yield "its keys are not those of the plan, once each and in order"
    stored = [row for row in rows if row.status == "ok"]
    for bucket in sorted({str(row.bucket) for row in stored} | set(record.shards)):
        places = [row.row for row in stored if row.bucket == bucket]
        if bucket not in record.shards:
            yield f"it has rows in {bucket}, and the record names no shard for that bucket"
        elif sorted(places) != list(range(len(places))):
            yield f"its rows in {bucket} are not 0 to {len(places) - 1}, once each"
    if any(row.row != -1 or row.bucket is not None or not row.error for row in rows if row.status != "ok"):
        yield "a row without latents has a place in a shard, or no reason"
    for row in stored:
        size = SIZE.fullmatch(row.bucket or "")
        if size is not None and not _is_inside(row, int(size[1]), int(size[2])):
            yield f"the crop of {row.key} is not inside its scaled image"
        if not row.source_hash:
            yield f"{row.key} has latents and no source hash"
    if Counts.of(rows) != record.counts:
        yield "its rows are not the counts of the commit record"


def _is_inside(row: IndexRow, width: int, height: int) -> bool:
    sizes = (row.scaled_width, row.scaled_height, row.crop_left, row.crop_top)
    if any(size is None for size in sizes):
        return False
    scaled_width, scaled_height, left, top = (int(size or 0) for size in sizes)
    return 0 <= left <= scaled_width - width and 0 <= top <= scaled_height - height


def _shard_problems(
    store: LatentStore, manifest: Manifest, record: CommitRecord, bucket: str, rows: list[IndexRow] | None
) -> Iterator[str]:
    try:
        shard = open_shard(store.folder / record.shards[bucket])
    except UserError as error:
        yield str(error)
        return
    if (shard.fingerprint, shard.unit, shard.bucket) != (manifest.fingerprint, record.unit, bucket):
        yield "its header belongs to another store, unit or bucket"
    if set(shard.tensors) != set(manifest.tensors):
        yield f"it holds {sorted(shard.tensors)}, not {list(manifest.tensors)}"
    known = latent_size(manifest, bucket)
    for tensor_name, tensor in shard.tensors.items():
        number = sum(row.bucket == bucket for row in rows) if rows is not None else len(tensor)
        shape = (number, manifest.latent_channels, *known)
        if tuple(tensor.shape) != shape or tensor.dtype != DTYPES[manifest.dtype]:
            found = f"{tuple(tensor.shape)} {tensor.dtype}"
            yield f"{tensor_name} is {found}, {shape} {manifest.dtype} was committed"


def latent_size(manifest: Manifest, bucket: str) -> tuple[int, int]:
    """(h, w) of the latents in a bucket, which may be one that `--small keep` made."""
    size = SIZE.fullmatch(bucket)
    if size is None:
        raise UserError(f"{bucket!r} is no bucket: it must be such as 1024x1024")
    if not manifest.buckets:
        raise UserError("manifest.json is damaged: it names no buckets")
    some: Bucket = manifest.buckets[0]
    return int(size[2]) * some.latent_height // some.height, int(size[1]) * some.latent_width // some.width


def _cells(manifest: Manifest, bucket: str) -> int:
    height, width = latent_size(manifest, bucket)
    return height * width
