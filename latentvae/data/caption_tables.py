"""Captions and labels that lie in archives and tables: found by key in an index, read by row or byte range."""

import bisect
import json
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from latentvae.data.entries import EntryTable, SourceEntry, io_reason
from latentvae.data.hub_dataset import DatasetSource
from latentvae.data.parquet import KEY_COLUMNS, RowGroups, as_keys, image_candidates, is_key_type, row_key
from latentvae.data.storage import file_name
from latentvae.data.tar import TarSource, members
from latentvae.errors import UserError, one_line

_TEXT_SUFFIXES = (".txt", ".cls", ".json")


def as_fields(values: Mapping[str, Any], without: Iterable[str] = ()) -> dict[str, Any]:
    """The fields of a row that are there; a `text` is the caption where no `caption` is."""
    fields = {str(name): value for name, value in values.items() if value is not None and name not in without}
    if "caption" not in fields and isinstance(fields.get("text"), str):
        fields["caption"] = fields.pop("text")
    return fields


class KeyIndex:
    """Positions of keys in a column: 8 bytes a key beside the column itself."""

    def __init__(self, keys: pa.ChunkedArray | pa.Array) -> None:
        self._keys = keys
        self._order = pc.sort_indices(self._keys).to_numpy()

    def find(self, key: str) -> list[int]:
        """Every position of `key`, ascending."""
        start = bisect.bisect_left(range(len(self._order)), key, key=self._at)  # UTF-8 keeps the order of code points
        stop = bisect.bisect_right(range(len(self._order)), key, lo=start, key=self._at)
        return sorted(int(position) for position in self._order[start:stop])

    def _at(self, place: int) -> str:
        text: str = self._keys[int(self._order[place])].as_py()
        return text


class TarCaptions:
    """From the `.txt` (caption), `.cls` (label) and `.json` (fields) members of the sample that an image belongs to.

    A sample is what shares a path up to the first dot of its base name, the rule of WebDataset.
    """

    def __init__(self, source: TarSource) -> None:
        self._source = source
        self._texts, self._index = EntryTable.from_entries(()), KeyIndex(pa.array([], pa.string()))
        self._is_indexed = False

    def _list(self) -> None:
        entries = (
            SourceEntry(f"{file_name(path)}/{member.name}", path, member.offset, member.num_bytes, None)
            for path in self._source.paths
            for member in members(path)
            if posixpath.splitext(member.name)[1].lower() in _TEXT_SUFFIXES
        )
        self._texts = EntryTable.from_entries(entries)
        self._index = KeyIndex(pa.array([sample_of(key) for key in self._texts.keys], pa.string()))
        self._is_indexed = True

    def get(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """The fields of each image; empty where it has none. Raises UserError for a text that cannot be read."""
        if not self._is_indexed:
            self._list()
        places = [(number, place) for number, key in enumerate(keys) for place in self._index.find(sample_of(key))]
        wanted = sorted({place for _, place in places})  # in the order of the files, for few and long reads
        contents = dict(zip(wanted, self._source.fetch([self._texts[place] for place in wanted]), strict=True))
        fields: list[dict[str, Any]] = [{} for _ in keys]
        for number, place in sorted(places, key=lambda pair: self._texts[pair[1]].key.lower().endswith(".txt")):
            fields[number] |= parsed(self._texts[place].key, contents[place])  # a .txt last: it wins over the JSON
        return fields


def sample_of(key: str) -> str:
    """The path of a tar member up to the first dot of its base name."""
    folder, _, base = key.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def parsed(name: str, content: object) -> dict[str, Any]:
    """The fields that a text file of a sample gives, by its extension. Raises UserError for what is no such text."""
    if not isinstance(content, bytes):
        raise UserError(f"{name} cannot be read: {one_line(content)}")
    try:
        text = content.decode("utf-8-sig").strip()
        extension = posixpath.splitext(name)[1].lower()
        if extension == ".txt":
            return {"caption": text}
        if extension == ".cls":
            return {"label": int(text) if text.lstrip("-").isdecimal() else text}
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} cannot be read as {extension_name(name)}: {io_reason(error)}") from error
    return as_fields(values) if isinstance(values, dict) else {"json": values}


def extension_name(name: str) -> str:
    """What kind of text a file should hold."""
    return "JSON" if name.lower().endswith(".json") else "UTF-8 text"


class ParquetCaptions:
    """The columns of Parquet files that are no images, by their key column, `file_name`, or file and row."""

    def __init__(self, paths: Sequence[str], key_column: str | None = None) -> None:
        self.paths = list(paths)
        self._groups = RowGroups()
        self._given = key_column
        self._key: str | None = None
        self._columns: list[str] = []
        self._ends = np.zeros(0, np.int64)  # rows up to the end of each file
        self._index: KeyIndex | None = None

    def _list(self) -> None:
        keys: list[pa.Array] = []
        counts: list[int] = []
        for path in self.paths:
            try:
                file = self._groups.open(path).file
                if not counts:
                    self._choose(path, file.schema_arrow)
                counts.append(file.metadata.num_rows)
                if self._key is None:
                    keys.append(pa.array([row_key(file_name(path), row) for row in range(counts[-1])], pa.string()))
                else:
                    column = as_keys(file.read(columns=[self._key], use_threads=False)[self._key], path)
                    if len(column) != counts[-1]:
                        raise UserError(f"{path} is damaged: it has {len(column)} keys for {counts[-1]} rows")
                    keys.extend(column.chunks)
            except (OSError, KeyError, pa.ArrowException) as error:
                raise UserError(f"the captions in {path} cannot be read: {io_reason(error)}") from error
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._index = KeyIndex(pa.chunked_array(keys, pa.string()))

    def _choose(self, path: str, schema: pa.Schema) -> None:
        images = image_candidates(schema)
        known = [*KEY_COLUMNS, "file_name"] if self._given is None else [self._given]
        self._key = next(
            (name for name in known if name in schema.names and is_key_type(schema.field(name).type)), None
        )
        if self._key is None and (self._given is not None or not images):
            raise UserError(f"{path} has no column {' or '.join(known)} of keys: it has {', '.join(schema.names)}")
        self._columns = [name for name in schema.names if name not in images and name != self._key]

    def get(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """The fields of each image; empty where there is no such key. Raises UserError where a file cannot be read."""
        if self._index is None:
            self._list()
        assert self._index is not None
        found = [self._index.find(key)[-1:] for key in keys]
        fields: list[dict[str, Any]] = [{} for _ in keys]
        for number in sorted((number for number, places in enumerate(found) if places), key=lambda one: found[one]):
            fields[number] = self._row(found[number][0])
        return fields

    def _row(self, place: int) -> dict[str, Any]:
        if not self._columns:
            return {}
        number = int(np.searchsorted(self._ends, place, side="right"))
        path, first = self.paths[number], int(self._ends[number - 1]) if number else 0
        try:
            row = self._groups.row(path, place - first, self._columns)
        except (OSError, pa.ArrowException, ValueError) as error:
            raise UserError(f"the captions in {path} cannot be read: {io_reason(error)}") from error
        return as_fields(row or {})


class DatasetCaptions:
    """The columns of a `datasets.Dataset` that are no images, by the keys of its source."""

    def __init__(self, source: DatasetSource) -> None:
        schema = source.dataset.features.arrow_schema
        images = {*image_candidates(schema), source.image_column, source.key_column}
        names = [name for name in schema.names if name not in images]
        self._rows = source.dataset.select_columns(names).with_format("arrow") if names else None
        self._source = source
        self._index: KeyIndex | None = None

    def get(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """The fields of each image; empty where there is no such key."""
        if self._rows is None:
            return [{} for _ in keys]
        if self._index is None:
            self._index = KeyIndex(self._source.entries().table["key"])
        found = [self._index.find(key)[:1] for key in keys]
        places = [place for one in found for place in one]
        rows = iter(self._rows[places].to_pylist() if places else [])
        return [as_fields(next(rows)) if one else {} for one in found]
