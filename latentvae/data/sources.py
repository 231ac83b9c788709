"""The one place that decides what a source is, from what the user gave."""

import os
from pathlib import Path

from latentvae.data.entries import ImageSource
from latentvae.data.folder import FolderSource, walk
from latentvae.data.hub_dataset import is_dataset, is_saved_dataset, open_dataset, open_hub, open_saved
from latentvae.data.listing import LIST_SUFFIXES, ListSource
from latentvae.data.parquet import ParquetSource
from latentvae.data.python_source import PythonSource
from latentvae.data.storage import expand, find_remote, is_url, suffix
from latentvae.data.tar import TAR_SUFFIXES, TarSource, compressed_error
from latentvae.errors import UserError
from latentvae.images import IMAGE_EXTENSIONS, DecodePolicy, PixelFormat
from latentvae.imported import import_object

_REMOTE = {*TAR_SUFFIXES, ".parquet", ".tar.gz", ".tgz", ".tar.zst"}  # any other URL is taken for a folder
_COMPRESSED = {".tgz": "gzip", ".tbz2": "bzip2", ".txz": "xz"}
KINDS = (
    "a folder of images, .tar files, .parquet files, a .txt or .jsonl list of paths, a folder of Dataset.save_to_disk, "
    "hf:owner/name, or python:module:function"
)


def open_source(
    source: str | Path | object,
    pixels: PixelFormat | None = None,
    policy: DecodePolicy | None = None,
    *,
    key_column: str | None = None,
    image_column: str | None = None,
    streaming: bool = False,
    split: str | None = None,
) -> ImageSource:
    """What the user gave => a source of `pixels`. Nothing is listed before `entries()`.

    Args:
        source: a folder of images; tar or Parquet files (a path, glob, `shard-{0000..0099}.tar`, several joined by
            `::`, URLs of fsspec, or a folder of them without images); a `.txt` or `.jsonl` list of paths; a folder of
            `Dataset.save_to_disk` or an `.arrow` file; `hf:owner/name?split=train`; `python:module:function`; a
            `datasets.Dataset`; any Python object that yields {"key", "image"}; an ImageSource, returned as it is.
        key_column, image_column: of Parquet files and datasets, where they are not found by themselves.
        streaming: read the files of a hub dataset in place instead of downloading all of them first.
        split: of a dataset that has several.

    Raises UserError for what cannot be a source, and for an option that its kind does not have.
    """
    columns = {"key_column": key_column, "image_column": image_column}
    if isinstance(source, str) and source.startswith("hf:") and not is_url(source):
        return open_hub(source, pixels, policy, streaming=streaming, split=split, **columns)
    if streaming:
        raise UserError(
            f"source {_shown(source)}: streaming is for hf:owner/name; other sources are read in place anyway"
        )
    if is_dataset(source):
        return open_dataset(source, pixels, policy, split, **columns)
    if isinstance(source, str | Path) and not str(source).startswith("python:"):
        return _open_files(source, pixels, policy, split, columns)
    _refuse({"split": split, **columns}, source)
    if isinstance(source, ImageSource):
        return source
    if isinstance(source, str):
        return PythonSource(import_object(source, field="source", what="function"), pixels, policy, name=source)
    return PythonSource(source, pixels, policy)


def _open_files(
    source: str | Path,
    pixels: PixelFormat | None,
    policy: DecodePolicy | None,
    split: str | None,
    columns: dict[str, str | None],
) -> ImageSource:
    name = str(source)
    if not name:  # a shell variable that is not set; as a path it would be the working folder
        raise UserError(f"source {name!r} names nothing: give {KINDS}")
    path = Path(name).expanduser()
    if not is_url(name) and path.exists() and ((path.is_dir() and is_saved_dataset(path)) or suffix(name) == ".arrow"):
        return open_saved(path, pixels, policy, split, **columns)
    _refuse({"split": split}, source)
    if not is_url(name) and path.is_dir():
        files = _archives_of(path)
        if not files:
            _refuse(columns, source)
            return FolderSource(path, pixels, policy)
    elif is_url(name) and "::" not in name and "*" not in name and suffix(name) not in _REMOTE:
        files = [file for file in find_remote(name) if suffix(file) in TAR_SUFFIXES | {".parquet"}]
        if not files:
            raise UserError(f"no .tar or .parquet files in {name}: images in a remote folder cannot be read one by one")
    else:
        files = expand(name)
        if not files:
            raise UserError(f"source {name!r} names nothing: give {KINDS}")
    return _open_kind(files, name, pixels, policy, columns)


def _open_kind(
    files: list[str],
    name: str,
    pixels: PixelFormat | None,
    policy: DecodePolicy | None,
    columns: dict[str, str | None],
) -> ImageSource:
    kinds = {suffix(file) for file in files}
    for file in files:
        if suffix(file).startswith(".tar.") or suffix(file) in _COMPRESSED:
            raise compressed_error(file, _COMPRESSED.get(suffix(file), suffix(file).removeprefix(".tar.")))
    if kinds == {".parquet"}:
        return ParquetSource(files, pixels, policy, name=name, **columns)
    _refuse(columns, name)
    if kinds <= TAR_SUFFIXES:
        return TarSource(files, pixels, policy, name=name)
    if kinds <= LIST_SUFFIXES and len(files) == 1 and not is_url(files[0]):
        return ListSource(files[0], pixels, policy)
    if len(kinds) > 1:
        raise UserError(f"source {name} mixes {', '.join(sorted(kinds))} files: give one kind at a time")
    (kind,) = kinds
    if kind in IMAGE_EXTENSIONS:
        raise UserError(f"{name} is not a folder but an image: give the folder it is in, or a .txt list of paths")
    raise UserError(
        f"source {name} is not a folder, and a {kind or 'file without extension'} cannot be read: give {KINDS}"
    )


def _archives_of(folder: Path) -> list[str]:
    """The tar files, or else the Parquet files, of a folder without images; empty where it has images, or neither."""
    found: dict[str, list[str]] = {".tar": [], ".parquet": []}
    for _, file, _ in walk(folder):
        extension = os.path.splitext(file.name)[1].lower()
        if extension in IMAGE_EXTENSIONS or extension == ".npy":
            return []
        if extension in found:
            found[extension].append(file.path)
    if all(found.values()):
        raise UserError(f"{folder} holds .tar and .parquet files: give one kind, such as {folder / '*.tar'}")
    return found[".tar"] or found[".parquet"]


def _refuse(options: dict[str, str | None], source: object) -> None:
    for option, value in options.items():
        if value is not None:
            raise UserError(f"source {_shown(source)} has no use for {option}: leave it out")


def _shown(source: object) -> str:
    return str(source) if isinstance(source, str | Path) else f"of type {type(source).__name__}"
