"""Latents in WebDataset tars and in Parquet files: one size of image per file, byte for byte the same each time."""

import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from latentvae.errors import UserError
from latentvae.latents.operating.file_names import are_apart, safe_part, safe_path
from latentvae.latents.operating.handed import HandedImage, Handing, little_endian, npy_bytes
from latentvae.latents.operating.parts import stored_buckets, stored_keys
from latentvae.latents.reading.readable import bucket_size

ROW_GROUP_BYTES = 32 * 2**20  # of latents: what a reader of a few rows has to read

Captions = Mapping[str, Mapping[str, Any]]  # key -> fields


@dataclass(frozen=True)
class WrittenFile:
    """A file that was written, and how many images are in it."""

    name: str
    num_images: int


def write_tars(handing: Handing, folder: Path, captions: Captions, shard_images: int) -> Iterator[WrittenFile]:
    """`latents-WxH-00000.tar`, ... : of each image `.latents.npy`, `.json`, and where there are any
    `.latents_hflip.npy` and `.txt` (its caption). WebDataset's own decoder reads them all, without pickle.
    """
    keys = {bucket: stored_keys(handing.store, bucket) for bucket in stored_buckets(handing.store)}
    names = iter(sample_names(list(chain.from_iterable(keys.values()))))
    for name, images, count in _shards(handing, keys, shard_images):
        path = folder / f"{name}.tar"
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
            for image in images:
                stem = next(names)
                for suffix, data in _members(image, captions.get(image.row.key, {})):
                    entry = tarfile.TarInfo(f"{stem}.{suffix}")  # no time, no owner: equal work gives equal bytes
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
        yield WrittenFile(path.name, count)


def write_parquets(handing: Handing, folder: Path, captions: Captions, shard_images: int) -> Iterator[WrittenFile]:
    """`data/latents-WxH-00000.parquet`, ... : a row per image; `latents` is binary, in C order, little-endian, of the
    row's `shape` and `dtype`. Other fields of captions than the text are JSON in `fields`.
    """
    schema = parquet_schema(handing.has_mirrored, bool(captions))
    (folder / "data").mkdir()
    keys = {bucket: stored_keys(handing.store, bucket) for bucket in stored_buckets(handing.store)}
    for stem, images, count in _shards(handing, keys, shard_images):
        name = f"data/{stem}.parquet"
        options = {
            "compression": "none",  # of half-precision noise 15% would be saved, and random reads be slower by far
            "use_dictionary": ["bucket", "dtype"],
            "write_page_checksum": True,
        }
        with pq.ParquetWriter(folder / name, schema, **options) as writer:
            while group := _row_group(images, captions):
                writer.write_table(pa.Table.from_pylist(group, schema=schema), row_group_size=len(group))
        yield WrittenFile(name, count)


def _row_group(images: Iterator[HandedImage], captions: Captions) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    size = 0
    for image in images:
        rows.append(_parquet_row(image, captions))
        size += image.latents.nbytes
        if size >= ROW_GROUP_BYTES:
            break
    return rows


def parquet_schema(has_mirrored: bool, has_captions: bool) -> pa.Schema:
    """Columns of the Parquet files. Sizes and places are pixels."""
    columns: list[tuple[str, pa.DataType]] = [("key", pa.string()), ("latents", pa.binary())]
    columns += [("latents_hflip", pa.binary())] if has_mirrored else []
    columns += [("shape", pa.list_(pa.int32())), ("dtype", pa.string()), ("bucket", pa.string())]
    names = ("original_width", "original_height", "target_width", "target_height", "crop_top", "crop_left")
    columns += [(name, pa.int32()) for name in names]
    columns += [("caption", pa.string()), ("fields", pa.string())] if has_captions else []
    return pa.schema(columns)


def sample_names(keys: Sequence[str]) -> list[str]:
    """Names of the samples of tars: keys without extension and, as WebDataset cuts at the first one, without dots.

    Where that would give two images one name the extension is kept, as `a_jpg`; where that does not help, all get a
    number in front. The key itself is in the sample's `.json`.
    """
    safe = [PurePosixPath(safe_path(key)) for key in keys]
    for names in ([_undotted(path.with_name(path.stem)) for path in safe], [_undotted(path) for path in safe]):
        if are_apart(names):
            return names
    return [f"{index:09d}_{safe_part(str(_undotted(path)).replace('/', '_'))}" for index, path in enumerate(safe)]


def _undotted(path: PurePosixPath) -> str:
    return str(path.with_name(path.name.replace(".", "_") or "_"))


def _shards(
    handing: Handing, keys: Mapping[str, Sequence[str]], shard_images: int
) -> Iterator[tuple[str, Iterator[HandedImage], int]]:
    """(name without suffix, its images, their number)."""
    for bucket, there in keys.items():
        images = handing.images(bucket)
        for number, start in enumerate(range(0, len(there), shard_images)):
            count = min(shard_images, len(there) - start)
            yield f"latents-{bucket}-{number:05d}", islice(images, count), count


def _members(image: HandedImage, fields: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    others = {name: value for name, value in fields.items() if name != "caption"}
    about = _about(image) | ({"fields": others} if others else {})
    yield "json", _json(about, image.row.key).encode()
    yield "latents.npy", npy_bytes(image.latents)
    if image.mirrored is not None:
        yield "latents_hflip.npy", npy_bytes(image.mirrored)
    if "caption" in fields:
        yield "txt", fields["caption"].encode()


def _about(image: HandedImage) -> dict[str, Any]:
    """Sizes are (height, width), as SDXL's conditioning takes them."""
    row = image.row
    width, height = bucket_size(str(row.bucket))
    return {
        "key": row.key,
        "original_size": [row.height, row.width],
        "crop_top_left": [row.crop_top, row.crop_left],
        "target_size": [height, width],
    }


def _parquet_row(image: HandedImage, captions: Captions) -> dict[str, Any]:
    row, fields = image.row, captions.get(image.row.key, {})
    width, height = bucket_size(str(row.bucket))
    values: dict[str, Any] = {
        "key": row.key,
        "latents": little_endian(image.latents).tobytes(),
        "shape": list(image.latents.shape),
        "dtype": str(image.latents.dtype),
        "bucket": row.bucket,
        "original_width": row.width,
        "original_height": row.height,
        "target_width": width,
        "target_height": height,
        "crop_top": row.crop_top,
        "crop_left": row.crop_left,
    }
    if image.mirrored is not None:
        values["latents_hflip"] = little_endian(image.mirrored).tobytes()
    if captions:
        others = {name: value for name, value in fields.items() if name != "caption"}
        values |= {"caption": fields.get("caption"), "fields": _json(others, row.key) if others else None}
    return values


def _json(values: Mapping[str, Any], key: str) -> str:
    try:
        text = json.dumps(values, ensure_ascii=False, allow_nan=False)
        text.encode()
        return text
    except (TypeError, ValueError) as error:
        raise UserError(f"the fields of {key} cannot be written as JSON: {error}") from error
