"""Images named by a list of paths: a text file, or JSON lines."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from latentvae.data.entries import EntryTable, ListedSource, SourceEntry, safe_key
from latentvae.data.storage import is_url, read_file
from latentvae.errors import UserError, one_line
from latentvae.images import DecodePolicy, PixelFormat

LIST_SUFFIXES = frozenset({".txt", ".jsonl"})
PATH_FIELDS = ("path", "file_name", "image")


def json_lines(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line number, object) of a JSON lines file. Raises UserError that names the line."""
    for number, line in text_lines(file):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}, line {number}: is not JSON ({one_line(error)})") from error
        if not isinstance(value, dict):
            raise UserError(f"{file}, line {number}: is not a JSON object")
        yield number, value


def text_lines(file: Path) -> Iterator[tuple[int, str]]:
    """(line number, line) of those that are not blank. Raises UserError for what is no UTF-8 text."""
    try:
        with open(file, encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line.strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as UTF-8 text: {one_line(error)}") from error


def key_of_path(path: str) -> str:
    """The key of an image that a list or a table names by a path or URL; empty where that names no file."""
    return safe_key(path.partition("://")[2] if is_url(path) else path)


class ListSource(ListedSource):
    """The images that a list names, in the order of their keys.

    `.txt`: a path or URL a line; blank lines and those that begin with # are skipped. `.jsonl`: objects with the path
    in `path`, `file_name` or `image`, and optionally a `key`. Paths are relative to the list's folder. The key of a
    path is the path as written, without what leads out of the folder. A file that is absent cannot be fetched.
    """

    is_sequential = False

    def __init__(self, file: str | Path, pixels: PixelFormat | None = None, policy: DecodePolicy | None = None) -> None:
        super().__init__(str(file), pixels, policy)
        self.file = Path(file)
        if self.file.suffix.lower() not in LIST_SUFFIXES:
            raise UserError(f"{file} is no list of images: its name must end in {' or '.join(sorted(LIST_SUFFIXES))}")
        if not self.file.is_file():
            raise UserError(f"{file} does not exist or is no file: give the path of a list of images")

    def rows(self) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
        """(key, path as written, other fields) of every line."""
        if self.file.suffix.lower() == ".txt":
            for number, line in text_lines(self.file):
                if not line.startswith("#"):
                    yield self._key(line, number), line, {}
            return
        for number, value in json_lines(self.file):
            field = next((field for field in PATH_FIELDS if isinstance(value.get(field), str)), None)
            if field is None:
                raise UserError(f"{self.file}, line {number}: a path is needed in one of {', '.join(PATH_FIELDS)}")
            key = value.get("key")
            if key is not None and (not isinstance(key, str | int) or key == ""):
                raise UserError(f"{self.file}, line {number}: the key is {key!r}; it must be text")
            others = {name: content for name, content in value.items() if name not in (field, "key")}
            yield str(key) if key is not None else self._key(value[field], number), value[field], others

    def _key(self, path: str, number: int) -> str:
        key = key_of_path(path)
        if not key:
            raise UserError(f"{self.file}, line {number}: {path!r} names no file")
        return key

    def list_entries(self) -> EntryTable:
        return EntryTable.from_entries(self._entry(key, path) for key, path, _ in self.rows()).sorted_by_key()

    def _entry(self, key: str, path: str) -> SourceEntry:
        if is_url(path):
            return SourceEntry(key, path, None, None, None)
        path = os.path.join(self.file.parent, os.path.expanduser(path))
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            return SourceEntry(key, path, None, None, None)  # reading it will say why
        return SourceEntry(key, path, None, status.st_size, status.st_mtime_ns)

    def looked_for(self) -> str:
        return "every line that is not blank and does not begin with # names an image"

    def fetch(self, entries: Sequence[SourceEntry]) -> list[bytes | np.ndarray | Exception]:
        return [read_file(entry.uri) for entry in entries]
