"""What a source lists, one entry per image in a table that a million fit into; and what all kinds of source do."""

import posixpath
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, overload, runtime_checkable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentvae.errors import UserError, one_line
from latentvae.images import DecodePolicy, ImageError, PixelFormat, conform, decode

_MAX_TEXT = 2**30  # bytes of strings in one Arrow array; its 32-bit offsets end at twice that
_CHUNK = 65_536  # entries that are held as Python objects at a time

ENTRIES = pa.schema(
    [
        ("key", pa.string()),
        ("uri", pa.string()),
        ("offset", pa.int64()),
        ("num_bytes", pa.int64()),
        ("mtime_ns", pa.int64()),
    ]
)


@dataclass(frozen=True, slots=True)
class SourceEntry:
    """One image of a source, before it is read: enough to fetch it without listing the source again."""

    key: str  # its identity: the path inside the source with extension, "/" between folders
    uri: str  # path or URL of the file that holds it: the image itself, or an archive
    offset: int | None  # in that file: byte of a tar member's data, row, or item position; None: the file is the image
    num_bytes: int | None  # of the encoded image; None where only reading it would tell
    mtime_ns: int | None  # last change of the file at `uri`, ns since 1970; None where it has none


class EntryTable(Sequence[SourceEntry]):
    """Entries in columns of the schema ENTRIES: a million take about 150 MB."""

    def __init__(self, table: pa.Table) -> None:
        if table.schema != ENTRIES:
            raise TypeError(f"the columns are {table.schema.names}: a table of ENTRIES is needed")
        self.table = table.combine_chunks()

    @classmethod
    def from_entries(cls, entries: Iterable[SourceEntry]) -> "EntryTable":
        """Taken from the iterable a part at a time. Raises UserError where a name is not valid Unicode."""
        remaining = iter(entries)
        parts = []
        while part := list(islice(remaining, _CHUNK)):
            columns = {name: [getattr(entry, name) for entry in part] for name in ENTRIES.names}
            parts.append(_arrow(columns))
        return cls(pa.concat_tables(parts) if parts else ENTRIES.empty_table())

    @classmethod
    def from_columns(
        cls,
        key: Sequence[str] | pa.Array,
        uri: str | Sequence[str],
        offset: Sequence[int | None] | np.ndarray | None = None,
        num_bytes: Sequence[int | None] | np.ndarray | None = None,
        mtime_ns: int | Sequence[int | None] | None = None,
    ) -> "EntryTable":
        """Columns of equal length; one `uri` or `mtime_ns` stands for all rows, None for an empty column."""
        count = len(key)
        columns = {
            "key": key,
            "uri": pa.repeat(pa.scalar(_unicode(uri), pa.string()), count) if isinstance(uri, str) else uri,
            "offset": pa.nulls(count, pa.int64()) if offset is None else offset,
            "num_bytes": pa.nulls(count, pa.int64()) if num_bytes is None else num_bytes,
            "mtime_ns": pa.repeat(pa.scalar(mtime_ns, pa.int64()), count)
            if mtime_ns is None or isinstance(mtime_ns, int)
            else mtime_ns,
        }
        return cls(_arrow(columns))

    @classmethod
    def concatenated(cls, tables: Iterable["EntryTable"]) -> "EntryTable":
        """All entries, table after table."""
        parts = [table.table for table in tables]
        return cls(pa.concat_tables(parts) if parts else ENTRIES.empty_table())

    def __len__(self) -> int:
        return self.table.num_rows

    @overload
    def __getitem__(self, index: int) -> SourceEntry: ...
    @overload
    def __getitem__(self, index: slice) -> "EntryTable": ...
    def __getitem__(self, index: int | slice) -> "SourceEntry | EntryTable":
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return EntryTable(self.table.slice(start, max(0, stop - start)))
            return self._taken(np.arange(start, stop, step))
        position = int(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"entry {position} of {len(self)}")
        return SourceEntry(*(column[position % len(self)].as_py() for column in self.table.columns))

    def __iter__(self) -> Iterator[SourceEntry]:
        for batch in self.table.to_batches(max_chunksize=_CHUNK):
            yield from map(SourceEntry, *(column.to_pylist() for column in batch.columns))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EntryTable) and bool(self.table.equals(other.table))

    @property
    def keys(self) -> list[str]:
        """Of all entries, in order."""
        keys: list[str] = self.table["key"].to_pylist()
        return keys

    def sorted_by_key(self) -> "EntryTable":
        """In the order of the keys' code points."""
        return self._taken(pc.sort_indices(self.table["key"]))  # UTF-8 keeps the order of code points

    def _taken(self, places: pa.Array | np.ndarray) -> "EntryTable":
        return EntryTable(pa.table([take(column, places) for column in self.table.columns], schema=ENTRIES))

    def duplicate(self) -> str | None:
        """The first key, in order, that more than one entry has."""
        ordered = take(self.table["key"], pc.sort_indices(self.table["key"]))
        same = pc.equal(ordered[1:], ordered[:-1]) if len(ordered) > 1 else pa.array([], pa.bool_())
        position = pc.index(same, True).as_py()
        return None if position < 0 else str(ordered[position])


def take(column: pa.ChunkedArray, places: pa.Array | np.ndarray) -> pa.ChunkedArray:
    """`column.take`, also of more text than one Arrow array of strings can hold (2 GiB)."""
    if column.type != pa.string() or column.nbytes < _MAX_TEXT:
        return column.take(places)
    large = column.cast(pa.large_string()).combine_chunks()
    starts = range(0, len(places), _CHUNK)
    return pa.chunked_array([large.take(places[start : start + _CHUNK]).cast(pa.string()) for start in starts])


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        shown = text.encode("utf-8", "backslashreplace").decode()
        raise UserError(f"the name {shown} is not valid Unicode: rename that file") from None
    return text


def _arrow(columns: dict[str, Any]) -> pa.Table:
    try:
        return pa.table(columns, schema=ENTRIES)
    except UnicodeEncodeError:
        for name in ("key", "uri"):
            for text in columns[name]:
                _unicode(text)
        raise


def safe_key(path: str) -> str:
    """A path as it is written in a list or an archive => a key that leads out of no folder when it becomes a file name.

    "/" between parts; without a drive, a leading "/", "." and "..".
    """
    path = path.replace("\\", "/")
    if len(path) > 1 and path[1] == ":":
        path = path[2:]
    parts = posixpath.normpath(path).split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))


@runtime_checkable
class ImageSource(Protocol):
    """What training and encoding read from, one thread at a time.

    Picklable, so that worker processes can be spawned with it, and forked ones open their own files.
    """

    name: str  # for logs and manifests: what the user gave
    is_sequential: bool  # neighbouring entries lie in one file, so that reading in order is far cheaper than at random

    def __len__(self) -> int: ...

    def entries(self) -> EntryTable:
        """Every image in the source's own order: files by key, archives in sorted order with their members in theirs.

        Listed at the first call, and kept. Raises UserError for a key that two images have, and where there are none.
        """
        ...

    def fetch(self, entries: Sequence[SourceEntry]) -> list[bytes | np.ndarray | Exception]:
        """The encoded bytes of each image, or an array where there are none; ImageError or OSError where it fails.

        Works from the entries alone. Never gives another image than the entry's.
        """
        ...

    def decode(self, content: bytes | np.ndarray) -> np.ndarray:
        """What `fetch` gave => (H, W, C) of the source's pixel format, or ImageError."""
        ...

    def read(self, index: int) -> np.ndarray:
        """Image `index` of `entries()` => (H, W, C) of the source's pixel format, or ImageError."""
        ...


class ListedSource(ABC):
    """What all kinds of source have in common: they list themselves once, and decode alike."""

    is_sequential = True

    def __init__(self, name: str, pixels: PixelFormat | None, policy: DecodePolicy | None) -> None:
        self.name = name
        self.pixels = pixels or PixelFormat()
        self.policy = policy or DecodePolicy()
        self._entries: EntryTable | None = None

    @abstractmethod
    def list_entries(self) -> EntryTable:
        """List the source anew."""

    @abstractmethod
    def fetch(self, entries: Sequence[SourceEntry]) -> list[bytes | np.ndarray | Exception]: ...

    def looked_for(self) -> str:
        """What was not found in a source without images."""
        return "there must be at least one"

    def entries(self) -> EntryTable:
        if self._entries is None:
            listed = self.list_entries()
            if not len(listed):
                raise UserError(f"no images in {self.name}: {self.looked_for()}")
            twice = listed.duplicate()
            if twice is not None:
                raise UserError(f"{self.name} has the key {twice!r} twice: every image needs a key of its own")
            self._entries = listed
        return self._entries

    def __len__(self) -> int:
        return len(self.entries())

    def decode(self, content: bytes | np.ndarray) -> np.ndarray:
        if not isinstance(content, np.ndarray):
            return decode(content, self.pixels, self.policy)
        if content.dtype != self.pixels.numpy_dtype:  # an array says what it is: nothing is converted behind its back
            raise ImageError(f"is a {content.dtype} array; {self.pixels.dtype} is declared")
        return conform(content, self.pixels)

    def read(self, index: int) -> np.ndarray:
        content = self.fetch([self.entries()[index]])[0]
        if isinstance(content, ImageError):
            raise content
        if isinstance(content, OSError):
            raise ImageError(f"cannot be read ({type(content).__name__}: {io_reason(content)})") from content
        if isinstance(content, Exception):
            raise content
        return self.decode(content)


def io_reason(error: Exception) -> str:
    """What the system or a library says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error)[:200] or type(error).__name__
