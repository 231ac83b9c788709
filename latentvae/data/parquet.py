"""Images as bytes in the rows of Parquet files."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from latentvae.data.entries import EntryTable, ListedSource, SourceEntry, io_reason
from latentvae.data.storage import OpenFiles, file_name, file_state, is_url
from latentvae.errors import UserError
from latentvae.images import DecodePolicy, ImageError, PixelFormat

_FOOTERS = 64  # of files that are kept: each lists every column of every row group
KEY_COLUMNS = ("key", "__key__", "id")  # taken for the key where the user names none


def image_candidates(schema: pa.Schema) -> list[str]:
    """Columns that may hold encoded images: structs with `bytes` as Hugging Face writes them, or plain binary."""
    return [field.name for field in schema if _is_binary(field.type) or _is_image_struct(field.type)]


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_image_struct(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)


def choose_columns(
    schema: pa.Schema, name: str, image_column: str | None, key_column: str | None
) -> tuple[str, str | None]:
    """(image column, key column or None) of a table. UserError where they are not there or not clear."""
    candidates = image_candidates(schema)
    for given, option in ((image_column, "image_column"), (key_column, "key_column")):
        if given is not None and given not in schema.names:
            raise UserError(f"{name} has no column {given!r}: {option} must be one of {', '.join(schema.names)}")
    twice = next((column for column in schema.names if schema.names.count(column) > 1), None)
    if twice is not None:
        raise UserError(f"{name} has the column {twice!r} twice: rename one, or leave it out of the table")
    if image_column is None:
        if len(candidates) != 1:
            found = f"{', '.join(candidates)} may all be" if candidates else f"none of {', '.join(schema.names)} is"
            raise UserError(f"{name}: {found} the column of encoded images: name it with image_column")
        image_column = candidates[0]
    elif image_column not in candidates:
        raise UserError(f"{name}: column {image_column!r} holds {schema.field(image_column).type}, no encoded images")
    if key_column is None:
        key_column = next((column for column in KEY_COLUMNS if column in schema.names and column != image_column), None)
    if key_column is not None and not is_key_type(schema.field(key_column).type):
        raise UserError(
            f"{name}: column {key_column!r} holds {schema.field(key_column).type}; keys are text or whole numbers: "
            "name another one with key_column"
        )
    return image_column, key_column


def is_key_type(kind: pa.DataType) -> bool:
    """Whether values of this type can be keys."""
    return bool(
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
        or pa.types.is_integer(kind)
    )


def as_keys(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """A column as text. UserError where a row has no key, or an empty one."""
    keys = column.cast(pa.string())
    keys.validate(full=True)  # raises for what a damaged file may hold, such as text that is no UTF-8
    missing = keys.null_count + (pc.sum(pc.equal(keys, "")).as_py() or 0)
    if missing:
        raise UserError(f"{name}: {missing} rows have no key; every image needs one: name the column with key_column")
    return keys


def row_key(table: str, row: int) -> str:
    """The key of a row of a table that has none of its own."""
    return f"{table}/{row:09d}"


def image_bytes(value: Any) -> bytes | Exception:
    """A cell of an image column => the encoded image, or why there is none."""
    content = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(content, bytes):
        return content
    path = value.get("path") if isinstance(value, dict) else None
    return ImageError(f"has no bytes in its row, only the path {path}" if path else "has no bytes in its row")


@dataclass(frozen=True)
class _Opened:
    stream: IO[bytes]
    file: pq.ParquetFile
    ends: np.ndarray  # (G,) rows up to the end of each row group
    mtime_ns: int | None


class RowGroups:
    """Row groups of Parquet files, by the row; the last one that was read is kept."""

    def __init__(self) -> None:
        self._files = OpenFiles()
        self._opened: dict[str, _Opened] = {}
        self._kept: tuple[tuple[str, int, tuple[str, ...]], pa.Table] | None = None

    def __reduce__(self) -> tuple[type["RowGroups"], tuple[()]]:
        return RowGroups, ()

    def open(self, path: str) -> _Opened:
        """Raises OSError, and UserError for what is no Parquet file."""
        stream = self._files.get(path)
        opened = self._opened.get(path)
        if opened is None or opened.stream is not stream:
            try:
                metadata = opened.file.metadata if opened is not None else None
                options = {"pre_buffer": True, "page_checksum_verification": True}  # where the writer made checksums
                file = pq.ParquetFile(stream, metadata=metadata, **options)
            except (OSError, pa.ArrowException, ValueError) as error:
                raise UserError(f"{path} cannot be read as a Parquet file: {io_reason(error)}") from error
            groups = range(file.metadata.num_row_groups)
            ends = np.cumsum([file.metadata.row_group(index).num_rows for index in groups], dtype=np.int64)
            self._opened.pop(path, None)
            while len(self._opened) >= _FOOTERS:
                del self._opened[next(iter(self._opened))]
            opened = self._opened[path] = _Opened(stream, file, ends, file_state(path).mtime_ns)
        return opened

    def row(self, path: str, row: int, columns: Sequence[str]) -> dict[str, Any] | None:
        """The columns of one row; None where the file has no such row. Fast where rows of a group follow each other."""
        opened = self.open(path)
        if not 0 <= row < opened.file.metadata.num_rows:
            return None
        group = int(np.searchsorted(opened.ends, row, side="right"))
        wanted = (path, group, tuple(columns))
        if self._kept is None or self._kept[0] != wanted:
            self._kept = None  # its memory, before that of the next
            table = opened.file.read_row_group(group, columns=list(columns), use_threads=False)
            if table.num_rows != opened.file.metadata.row_group(group).num_rows:
                raise OSError(f"row group {group} is damaged: {table.num_rows} rows")
            self._kept = (wanted, table)
        first = int(opened.ends[group - 1]) if group else 0
        values: dict[str, Any] = self._kept[1].slice(row - first, 1).to_pylist()[0]
        return values


class ParquetSource(ListedSource):
    """The images in a column of Parquet files, in the order of the files and their rows.

    Keys are those of `key_column` (by itself: `key`, `__key__` or `id`), else "<file name>/<row as nine digits>".
    """

    def __init__(
        self,
        paths: Sequence[str],
        pixels: PixelFormat | None = None,
        policy: DecodePolicy | None = None,
        *,
        key_column: str | None = None,
        image_column: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name or "::".join(paths), pixels, policy)
        self.paths = list(paths)
        for path in self.paths:
            if not is_url(path) and not os.path.isfile(path):
                raise UserError(f"{path} does not exist or is no file: give the path of a Parquet file")
        self._given = (image_column, key_column)
        self._groups = RowGroups()
        self._columns: tuple[str, str | None] | None = None

    def columns(self, path: str) -> tuple[str, str | None]:
        """(image column, key column or None), decided by the file at `path` where it is the first one looked at."""
        if self._columns is None:
            self._columns = choose_columns(self._groups.open(path).file.schema_arrow, path, *self._given)
        return self._columns

    def list_entries(self) -> EntryTable:
        return EntryTable.concatenated(map(self._list_file, self.paths))

    def _list_file(self, path: str) -> EntryTable:
        image, key = self.columns(self.paths[0])
        opened = self._groups.open(path)
        file = opened.file
        missing = [column for column in (image, key) if column is not None and column not in file.schema_arrow.names]
        if missing:
            raise UserError(f"{path} has no column {missing[0]!r}, which {self.paths[0]} has: read them one by one")
        count, name = file.metadata.num_rows, file_name(path)
        if key is None:
            keys: Any = [row_key(name, row) for row in range(count)]
        else:
            try:
                keys = as_keys(file.read(columns=[key], use_threads=False)[key], path)
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"{path} cannot be read as a Parquet file: {io_reason(error)}") from error
            if len(keys) != count:
                raise UserError(f"{path} is damaged: it has {len(keys)} keys for {count} rows")
        return EntryTable.from_columns(keys, path, np.arange(count), None, opened.mtime_ns)

    def looked_for(self) -> str:
        return f"the {len(self.paths)} Parquet files have no rows"

    def fetch(self, entries: Sequence[SourceEntry]) -> list[bytes | np.ndarray | Exception]:
        return [self._fetch(entry) for entry in entries]

    def _fetch(self, entry: SourceEntry) -> bytes | Exception:
        offset = entry.offset or 0
        changed = ImageError(f"is no longer in row {offset} of {entry.uri}, which has changed since it was listed")
        try:
            image, key = self.columns(entry.uri)
            row = self._groups.row(entry.uri, offset, [image] if key is None else [image, key])
            # without keys, only the file's time says whether a row is still the same
            is_same = key is not None or self._groups.open(entry.uri).mtime_ns == entry.mtime_ns
        except OSError as error:
            return error
        except Exception as error:  # a damaged file raises almost anything
            return ImageError(f"cannot be read from {entry.uri} ({type(error).__name__}: {io_reason(error)})")
        if row is None or not is_same:
            return changed
        known = row_key(file_name(entry.uri), offset) if key is None else str(row[key])
        return image_bytes(row[image]) if known == entry.key else changed
