"""Images in tar files (WebDataset): indexed once by their headers, then read at random by byte ranges."""

import contextlib
import os
import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO

import numpy as np

from latentvae.data.entries import EntryTable, ListedSource, SourceEntry, io_reason, safe_key
from latentvae.data.folder import image_extensions
from latentvae.data.storage import OpenFiles, file_name, file_state, is_url, open_binary, suffix
from latentvae.errors import UserError
from latentvae.images import DecodePolicy, ImageError, PixelFormat

TAR_SUFFIXES = frozenset({".tar"})
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}
_BLOCK = tarfile.BLOCKSIZE
_MAX_READ = 64 * 2**20  # bytes of several members in one read
_MAX_GAP = 2**18  # between two wanted members that are still read together: about what a new request costs
_HEADERS = 2**16  # before a member's data that may belong to its headers: long names are in blocks of their own
_REMOTE_THREADS = 16  # waiting for answers, mostly


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar."""

    name: str
    offset: int  # of its data
    num_bytes: int


def members(path: str) -> Iterator[Member]:
    """Every file and link of a tar in its order, from the headers alone; hidden ones are left out.

    Raises UserError for a tar that is damaged or cut off, after the last whole member: it would be unsafe to take the
    part that is readable for the set.
    """
    count = place = 0
    try:
        # small reads: a buffer's worth is read at every header
        with open(path, "rb", buffering=4096) if not is_url(path) else open_binary(path) as stream:
            _refuse_compressed(path, stream)
            archive = tarfile.TarFile(fileobj=stream, errors="surrogateescape")
            while (info := archive.next()) is not None:
                vars(archive)["members"].clear()  # it would keep them all
                if archive.offset <= place:
                    raise tarfile.ReadError("a member of negative size")  # it would lead back, round and round
                name = safe_key(info.name)
                count, place = count + 1, archive.offset
                if (info.isreg() or info.islnk() or info.issym()) and not _is_hidden(name):
                    yield Member(name, info.offset_data, info.size)
            _require_end(stream, archive.offset)
    except UserError:
        raise
    except (OSError, tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise UserError(
            f"{path} is damaged or cut off: as a tar file only its first {count} members can be read "
            f"({io_reason(error)}); make or download it again, or leave it out"
        ) from error


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _refuse_compressed(path: str, stream: IO[bytes]) -> None:
    head = stream.read(6)
    stream.seek(0)
    for magic, kind in _COMPRESSED.items():
        if head.startswith(magic):
            raise compressed_error(path, kind)


def compressed_error(path: str, kind: str) -> UserError:
    """Why a compressed tar is refused."""
    return UserError(
        f"{path} is compressed ({kind}), so that no image in it can be reached without reading all before: "
        "decompress it to a plain .tar (the images inside are compressed already)"
    )


def _require_end(stream: IO[bytes], offset: int) -> None:
    """Raise where an archive ends in anything but its end mark, a block of zeros: tarfile takes that for the end."""
    stream.seek(offset)
    block = stream.read(_BLOCK)
    if len(block) < _BLOCK:
        raise tarfile.ReadError("it is cut off: its end mark is missing")
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"no header at byte {offset}")


class TarSource(ListedSource):
    """The images in tar files, shard by shard in the order given; links inside an archive are error rows.

    Keys are "<file name of the tar>/<member>". A damaged or cut off tar is a UserError of `entries`.
    """

    def __init__(
        self,
        paths: Sequence[str],
        pixels: PixelFormat | None = None,
        policy: DecodePolicy | None = None,
        *,
        name: str | None = None,
    ) -> None:
        super().__init__(name or "::".join(paths), pixels, policy)
        self.paths = list(paths)
        for path in self.paths:
            if suffix(path) not in TAR_SUFFIXES:
                raise UserError(f"{path} is not a .tar file")
            if not is_url(path) and not os.path.isfile(path):
                raise UserError(f"{path} does not exist or is no file: give the path of a tar file")
        self._files = OpenFiles()

    def list_entries(self) -> EntryTable:
        workers = min(_REMOTE_THREADS, len(self.paths)) if any(map(is_url, self.paths)) else 1
        with ThreadPoolExecutor(workers) as pool:
            return EntryTable.concatenated(pool.map(self._index, self.paths))

    def _index(self, path: str) -> EntryTable:
        prefix, extensions = file_name(path) + "/", image_extensions(self.pixels)
        keys, offsets, sizes = [], [], []
        try:
            mtime_ns = file_state(path).mtime_ns
        except OSError as error:
            raise UserError(f"{path} cannot be read: {io_reason(error)}") from error
        for member in members(path):
            if posixpath.splitext(member.name)[1].lower() in extensions:
                keys.append(prefix + member.name)
                offsets.append(member.offset)
                sizes.append(member.num_bytes)
        return EntryTable.from_columns(keys, path, np.array(offsets, np.int64), np.array(sizes, np.int64), mtime_ns)

    def looked_for(self) -> str:
        return f"looked in {len(self.paths)} tar files for members such as .jpg, .png, .webp or .tif"

    def fetch(self, entries: Sequence[SourceEntry]) -> list[bytes | np.ndarray | Exception]:
        contents: list[bytes | np.ndarray | Exception] = []
        for span in _spans(entries):
            contents += self._fetch_span(span)
        return contents

    def _fetch_span(self, span: Sequence[SourceEntry]) -> list[bytes | np.ndarray | Exception]:
        start = _place(span[0])[0]
        try:
            content = self._files.read(span[0].uri, start, _place(span[-1])[1] - start)
        except (OSError, UserError) as error:
            return [error for _ in span]
        return [self._member(entry, content, _place(entry)[0] - start) for entry in span]

    def _member(self, entry: SourceEntry, content: bytes, start: int) -> bytes | Exception:
        """The data behind the header at `start` of `content`, if it is the header of the entry."""
        name = entry.key.removeprefix(file_name(entry.uri) + "/")
        data = content[start + _BLOCK : _place(entry)[1] - _place(entry)[0] + start]
        try:
            header = tarfile.TarInfo.frombuf(content[start : start + _BLOCK], tarfile.ENCODING, "surrogateescape")
        except tarfile.TarError:
            header = tarfile.TarInfo()  # a sparse file may have a map here
        if header.isreg() and not header.issparse() and _is_it(header, name, entry):
            return data if len(data) == entry.num_bytes else ImageError(f"is cut off: {entry.uri} ends in it")
        try:
            return self._long_named(entry, name, data)
        except (OSError, tarfile.TarError, ValueError, UserError) as error:
            return ImageError(f"cannot be found in {entry.uri} ({io_reason(error)})")

    def _long_named(self, entry: SourceEntry, name: str, data: bytes) -> bytes | Exception:
        """A member whose headers take several blocks: those are searched for backwards from its data."""
        offset = entry.offset or 0
        begin = max(0, offset - _HEADERS)
        before = self._files.read(entry.uri, begin, offset - begin)
        for place in range(len(before) - _BLOCK, -1, -_BLOCK):
            try:
                tarfile.TarInfo.frombuf(before[place : place + _BLOCK], tarfile.ENCODING, "surrogateescape")
            except tarfile.TarError:
                continue  # no header
            stream = self._files.get(entry.uri)
            stream.seek(begin + place)
            with contextlib.suppress(tarfile.TarError):
                archive = tarfile.TarFile(fileobj=stream, errors="surrogateescape")
                header = archive.next()
                if header is None or header.offset_data != offset or not _is_it(header, name, entry):
                    continue
                if not header.isreg():
                    return ImageError("is a link inside the archive: repack it with --dereference --hard-dereference")
                if header.issparse():
                    size = file_state(entry.uri).num_bytes
                    if size is not None and header.size > size:  # no picture is mostly holes: memory is taken for all
                        return ImageError(f"is a sparse file of {header.size:,} bytes in a tar of {size:,}")
                    file = archive.extractfile(header)
                    return file.read() if file is not None else ImageError("is a sparse file that cannot be read")
                return data if len(data) == entry.num_bytes else ImageError(f"is cut off: {entry.uri} ends in it")
        return ImageError(f"is no longer at its place in {entry.uri}, which has changed since it was listed")


def _is_it(header: tarfile.TarInfo, name: str, entry: SourceEntry) -> bool:
    return safe_key(header.name) == name and header.size == entry.num_bytes


def _place(entry: SourceEntry) -> tuple[int, int]:
    """(byte of the last header block, end of the data)."""
    offset = entry.offset or 0
    return max(0, offset - _BLOCK), offset + (entry.num_bytes or 0)


def _spans(entries: Sequence[SourceEntry]) -> Iterator[list[SourceEntry]]:
    """Runs of entries that one read of at most _MAX_READ bytes gives, in order."""
    span: list[SourceEntry] = []
    for entry in entries:
        if span:
            (begin, _), (_, end), (start, stop) = _place(span[0]), _place(span[-1]), _place(entry)
            if entry.uri != span[0].uri or not 0 <= start - end <= _MAX_GAP or stop - begin > _MAX_READ:
                yield span
                span = []
        span.append(entry)
    if span:
        yield span
