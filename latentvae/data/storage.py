"""Local files and URLs alike: which ones a name stands for, and how pieces of them are read."""

import glob
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from latentvae.data.entries import io_reason
from latentvae.errors import UserError, one_line
from latentvae.images import ImageError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_OPEN_FILES = 32  # at a time in a process; a run may read thousands of shards
T = TypeVar("T")

ATTEMPTS = 3  # at a remote read, since networks drop some
_MAX_NAMES = 1_000_000  # out of braces, so that a slip of the hand does not fill the memory


def is_url(name: str) -> bool:
    """Whether it is read through fsspec; `file://` included."""
    return "://" in name


def suffix(name: str) -> str:
    """The lower-case extension of a path or URL, ".tar.gz" as a whole."""
    path = urlsplit(name).path if is_url(name) else name
    base = os.path.basename(path).lower()
    stem, extension = os.path.splitext(base)
    inner = os.path.splitext(stem)[1]
    return inner + extension if inner == ".tar" else extension


def file_name(name: str) -> str:
    """The last part of a path or URL."""
    path = urlsplit(name).path if is_url(name) else name.replace(os.sep, "/")
    return path.rstrip("/").rsplit("/", 1)[-1]


def expand(name: str) -> list[str]:
    """Braces ({0000..0099}, {a,b}), globs and several names joined by "::" => paths and URLs, sorted within each name.

    A local path that exists is taken literally. Raises UserError where nothing is found.
    """
    return [path for part in name.split("::") if part for path in _expand_one(part)]


def _expand_one(name: str) -> list[str]:
    if not is_url(name):
        name = os.path.expanduser(name)
        if os.path.exists(name):
            return [name]
    names = list(_without_braces(name))
    found = [path for one in names for path in _matches(one)]
    if not found:
        raise UserError(f"source {name} does not exist: give the path of a file, or a pattern that matches some")
    return found


def _without_braces(name: str) -> Iterator[str]:
    match = _BRACES.search(name)
    if match is None:
        yield name
        return
    span = _RANGE.fullmatch(match[1])
    if span is not None:
        first, last = int(span[1]), int(span[2])
        if not 0 <= last - first < _MAX_NAMES:
            raise UserError(f"source {name}: {match[0]} must count up, and to fewer than {_MAX_NAMES:,} names")
        middles = [f"{number:0{len(span[1])}d}" for number in range(first, last + 1)]
    else:
        middles = match[1].split(",")
    for middle in middles:
        yield from _without_braces(name[: match.start()] + middle + name[match.end() :])


def _matches(name: str) -> list[str]:
    is_pattern = any(character in name for character in "*?[")
    if is_url(name):
        # "?" begins the query of a web address, and "[" an IPv6 host
        if "*" not in name:
            return [name]
        with _explained(name):
            system, path = filesystem(name)
            return sorted(system.unstrip_protocol(found) for found in system.glob(path))
    if is_pattern:
        return sorted(glob.glob(name, recursive=True))
    if not os.path.exists(name):
        raise UserError(f"source {name} does not exist")
    return [name]


def find_remote(name: str) -> list[str]:
    """Every file below a remote folder, sorted."""
    with _explained(name):
        system, path = filesystem(name)
        return sorted(system.unstrip_protocol(found) for found in system.find(path))


def filesystem(url: str) -> tuple[Any, str]:
    """(fsspec file system, path in it). UserError where its package is not installed."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url} cannot be read: {io_reason(error)}") from error
    except ValueError as error:
        raise UserError(f"{url}: {io_reason(error)}") from error
    return system, path


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn what a remote file system says into one line that names the URL."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the libraries behind fsspec raise almost anything
        raise UserError(f"{url} cannot be read: {type(error).__name__}: {io_reason(error)}") from error


@dataclass(frozen=True)
class FileState:
    """What is known of a file without reading it."""

    num_bytes: int | None
    mtime_ns: int | None


def file_state(name: str) -> FileState:
    """Size and last change. Raises OSError or UserError where there is no such file."""
    if not is_url(name):
        status = os.stat(name)
        return FileState(status.st_size, status.st_mtime_ns)
    with _explained(name):
        system, path = filesystem(name)
        about = system.info(path)
    fields = ("LastModified", "mtime", "last_modified", "updated")  # as S3, local and SSH, Azure, Google name it
    changed = next((about[field] for field in fields if about.get(field)), None)
    if isinstance(changed, datetime):
        aware = changed if changed.tzinfo is not None else changed.replace(tzinfo=UTC)
        mtime_ns: int | None = int(aware.timestamp() * 1_000_000) * 1_000
    elif isinstance(changed, int | float):
        mtime_ns = int(changed * 1e9)
    else:
        mtime_ns = None
    return FileState(about.get("size"), mtime_ns)


def open_binary(name: str) -> IO[bytes]:
    """A seekable stream. Raises OSError or UserError."""
    if not is_url(name):
        return open(name, "rb")
    with _explained(name):
        system, path = filesystem(name)
        stream: IO[bytes] = system.open(path, "rb")
    if not stream.seekable():
        raise UserError(f"{url_of_server(name)} gives files only as a whole, no part of them: download {name} first")
    return stream


def url_of_server(url: str) -> str:
    """Without path and query."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def read_file(name: str) -> bytes | Exception:
    """All bytes of an image file, or the ImageError or OSError that says why they cannot be had."""
    if is_url(name):
        try:
            return with_attempts(lambda: _cat(name))
        except UserError as error:
            return ImageError(str(error))
        except OSError as error:
            return error
    try:
        if os.path.exists(name) and not os.path.isfile(name):
            return ImageError("is not a regular file")  # opening a named pipe would wait for ever
        with open(name, "rb") as file:
            return file.read()
    except OSError as error:
        return error
    except ValueError as error:  # a name with a zero byte in it
        return ImageError(f"has an impossible name: {one_line(error)}")


def _cat(url: str, start: int | None = None, end: int | None = None) -> bytes:
    system, path = filesystem(url)
    content: bytes = system.cat_file(path, start=start, end=end)
    return content


def with_attempts(read: Callable[[], T]) -> T:
    """A remote read, repeated where it fails. Raises OSError (FileNotFoundError at once) or UserError."""
    for attempt in range(ATTEMPTS):
        try:
            return read()
        except (FileNotFoundError, UserError):
            raise
        except Exception as error:  # the libraries behind fsspec raise almost anything
            if attempt == ATTEMPTS - 1:
                raise OSError(f"{type(error).__name__}: {io_reason(error)}") from error
            time.sleep(0.5 * 4**attempt)
    raise AssertionError("unreachable")


class OpenFiles:
    """The files that a process has open, the least recently used closed first; a forked child opens its own."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._files: OrderedDict[str, IO[bytes]] = OrderedDict()

    def __reduce__(self) -> tuple[type["OpenFiles"], tuple[()]]:
        return OpenFiles, ()  # another process opens its own

    def get(self, name: str) -> IO[bytes]:
        """A stream of the file as it was when it was opened here. Raises OSError or UserError."""
        if (
            self._pid != os.getpid()
        ):  # the parent's position in the file moves with ours, and its connections are its own
            self._pid, self._files = os.getpid(), OrderedDict()
        if name not in self._files:
            while len(self._files) >= _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            self._files[name] = open_binary(name)
        self._files.move_to_end(name)
        return self._files[name]

    def read(self, name: str, start: int, count: int) -> bytes:
        """Bytes start to start + count, fewer at the end of the file. Raises OSError or UserError.

        Of a URL in one ranged request.
        """
        if not is_url(name):
            stream = self.get(name)
            end = stream.seek(0, os.SEEK_END)  # what a header claims may be any number, and memory is taken for it
            stream.seek(start)
            return stream.read(max(0, min(count, end - start)))
        content = with_attempts(lambda: _cat(name, start, start + count))
        if len(content) > count:  # a web server that knows no ranges answers with the whole file
            raise OSError(f"{url_of_server(name)} gives files only as a whole")
        return content
