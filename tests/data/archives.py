"""Tiny archives, made for the tests."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def png(value: int = 0, size: tuple[int, int] = (8, 6)) -> bytes:
    """A picture whose red is `value`."""
    stream = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes] | Iterable[tuple[str, bytes]], **options) -> Path:
    """`options` are those of tarfile.open, and `mtime` of each member."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mtime = options.pop("mtime", 0)
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            archive.addfile(info, io.BytesIO(data))
    return path


def folder_as_tar(folder: Path, path: Path) -> Path:
    """Every file below a folder, in the order of their names."""
    files = sorted((file.relative_to(folder).as_posix(), file) for file in folder.rglob("*") if file.is_file())
    return write_tar(path, [(name, file.read_bytes()) for name, file in files])


def write_parquet(path: Path, *, row_group_size: int = 2, **columns) -> Path:
    """Columns by name; `image` as Hugging Face writes it where it is a list of bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = columns.get("image")
    if image is not None and not isinstance(image, pa.Array):
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns["image"] = pa.array([{"bytes": data, "path": None} for data in image], kind)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size, write_page_checksum=True)
    return path
