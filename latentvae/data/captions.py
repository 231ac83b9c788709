"""Captions and labels of images, found by the keys of their source: latents and pixels never carry them."""

import csv
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from latentvae.data.caption_tables import DatasetCaptions, KeyIndex, ParquetCaptions, TarCaptions, as_fields
from latentvae.data.entries import ImageSource, safe_key
from latentvae.data.folder import FolderSource
from latentvae.data.hub_dataset import DatasetSource, is_dataset
from latentvae.data.listing import PATH_FIELDS, ListSource, json_lines, key_of_path
from latentvae.data.parquet import ParquetSource
from latentvae.data.python_source import PythonSource
from latentvae.data.sources import open_source
from latentvae.data.storage import expand, is_url, suffix
from latentvae.data.tar import TarSource
from latentvae.errors import UserError, one_line

_METADATA = ("metadata.jsonl", "metadata.csv")  # as the imagefolder of Hugging Face datasets names them


class Captions(Protocol):
    """What is known of images beside their pixels. Picklable."""

    def get(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """The fields of each image by its key: `caption` for its text, others by their names; {} where there are none.

        Raises UserError for what is there but cannot be read.
        """
        ...


def open_captions(
    source: str | Path | Mapping[str, Any] | object,
    *,
    key_column: str | None = None,
    split: str | None = None,
    image_column: str | None = None,
    streaming: bool = False,
) -> Captions:
    """Captions of a source of images, or of a table or mapping of its keys.

    Args:
        source: whatever `open_source` takes (the captions that belong to those images), an ImageSource, a `.jsonl`,
            `.csv` or `.parquet` table with a column `key` or `file_name`, or a mapping key -> text or fields.
        key_column, split, image_column, streaming: as in `open_source`.

    Nothing is read before the first `get`; what that indexes is kept, so that edits are seen by captions opened later.
    Raises UserError for what has no captions.
    """
    if isinstance(source, Mapping) and not is_dataset(source):
        return MappingCaptions(source)
    if isinstance(source, str | Path) and not str(source).startswith(("hf:", "python:")):
        name = str(source)
        if not is_url(name) and suffix(name) in (".csv", ".jsonl"):
            return TableCaptions(Path(name).expanduser())
        if suffix(name) == ".parquet" and not Path(name).is_dir():
            return ParquetCaptions(expand(name), key_column)
    if not isinstance(source, ImageSource):
        source = open_source(source, key_column=key_column, image_column=image_column, streaming=streaming, split=split)
    return _captions_of(source)


def _captions_of(source: ImageSource) -> Captions:
    if isinstance(source, FolderSource):
        return FolderCaptions(source.folder)
    if isinstance(source, ListSource):
        return TableCaptions(source.file)
    if isinstance(source, TarSource):
        return TarCaptions(source)
    if isinstance(source, ParquetSource):
        return ParquetCaptions(source.paths, source.columns(source.paths[0])[1])
    if isinstance(source, DatasetSource):
        return DatasetCaptions(source)
    if isinstance(source, PythonSource):
        return PythonCaptions(source)
    raise UserError(f"{source.name} is a {type(source).__name__}, whose captions are not known: give them as a mapping")


def sidecar(image: str) -> dict[str, Any]:
    """The caption in the `.txt` beside an image file."""
    path = os.path.splitext(image)[0] + ".txt"
    try:
        if stat.S_ISFIFO(os.stat(path).st_mode):
            raise UserError(f"the caption {path} is a named pipe, no file")  # opening it would wait for ever
        with open(path, encoding="utf-8-sig") as file:
            return {"caption": file.read().strip()}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"the caption {path} cannot be read as UTF-8 text: {one_line(error)}") from error


def table_rows(file: Path) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """(key, path of the image or None, other fields) of a `.jsonl` or `.csv` table with a `key` or a path.

    The key of a path is that of `ListSource`. Raises UserError where a row has neither.
    """
    for number, row in json_lines(file) if file.suffix.lower() == ".jsonl" else _csv_rows(file):
        path_field = next((field for field in PATH_FIELDS if isinstance(row.get(field), str) and row[field]), None)
        path = row[path_field] if path_field is not None else None
        key = row.get("key")
        if key in (None, "") and path is None:
            raise UserError(f"{file}, line {number}: a key is needed, or a path in one of {', '.join(PATH_FIELDS)}")
        if key in (None, ""):
            key = key_of_path(str(path))
        yield str(key), path, as_fields(row, without=("key", path_field or ""))


def _csv_rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            for row in reader:
                yield reader.line_num, {name: value for name, value in row.items() if name is not None}
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{file} cannot be read as a CSV table: {one_line(error)}") from error


class MappingCaptions:
    """From a mapping key -> text or fields."""

    def __init__(self, mapping: Mapping[str, Any]) -> None:
        self._mapping = mapping

    def get(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """The fields of each image. Raises UserError for a value that is neither text nor a mapping."""
        return [self._fields(key) for key in keys]

    def _fields(self, key: str) -> dict[str, Any]:
        value = self._mapping.get(key)
        if value is None:
            return {}
        if isinstance(value, str):
            return {"caption": value}
        if isinstance(value, Mapping):
            return as_fields(value)
        raise UserError(f"the caption of {key!r} is a {type(value).__name__}: text or a mapping of fields is needed")


class FolderCaptions:
    """From the `.txt` beside an image, and from metadata.jsonl or metadata.csv in its folder or above, down to root.

    The nearest metadata file that names the image (`file_name`, relative to its own folder) counts, and a `.txt` wins
    over its caption. A `.txt` is read at every `get`, a metadata file once.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._metadata: dict[str, dict[str, dict[str, Any]]] = {}  # folder inside the source -> file name -> fields

    def get(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """The fields of each image."""
        return [self._of_metadata(key) | sidecar(os.path.join(self._folder, key)) for key in keys]

    def _of_metadata(self, key: str) -> dict[str, Any]:
        parts = key.split("/")
        for depth in range(len(parts) - 1, -1, -1):
            fields = self._table("/".join(parts[:depth])).get("/".join(parts[depth:]))
            if fields is not None:
                return fields
        return {}

    def _table(self, inside: str) -> dict[str, dict[str, Any]]:
        if inside not in self._metadata:
            table: dict[str, dict[str, Any]] = {}
            for name in _METADATA:
                file = self._folder / inside / name
                if file.is_file():
                    table.update({safe_key(path or key): fields for key, path, fields in table_rows(file)})
            self._metadata[inside] = table
        return self._metadata[inside]


class TableCaptions:
    """From a `.jsonl` or `.csv` table, or a `.txt` list of images; a `.txt` beside a listed image wins."""

    def __init__(self, file: Path) -> None:
        if not file.is_file():
            raise UserError(f"{file} does not exist or is no file: give the path of a table of captions")
        self._file = file
        self._rows: dict[str, tuple[str | None, dict[str, Any]]] | None = None

    def get(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """The fields of each image."""
        if self._rows is None:
            if self._file.suffix.lower() == ".txt":
                self._rows = {key: (path, {}) for key, path, _ in ListSource(self._file).rows()}
            else:
                self._rows = {key: (path, fields) for key, path, fields in table_rows(self._file)}
        return [self._fields(*self._rows.get(key, (None, {}))) for key in keys]

    def _fields(self, path: str | None, fields: dict[str, Any]) -> dict[str, Any]:
        if path is None or is_url(path):
            return dict(fields)
        return fields | sidecar(os.path.join(self._file.parent, os.path.expanduser(path)))


class PythonCaptions:
    """The fields of a Python source's items, but for the key and the image."""

    def __init__(self, source: PythonSource) -> None:
        self._source = source
        self._index: KeyIndex | None = None

    def get(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """The fields of each image. What the items raise goes through."""
        if self._index is None:
            self._index = KeyIndex(self._source.entries().table["key"])
        found = [self._index.find(key)[:1] for key in keys]
        return [as_fields(self._source.items[place[0]], without=("key", "image")) if place else {} for place in found]
