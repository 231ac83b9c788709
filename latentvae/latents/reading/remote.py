"""The files of a store behind a URL: each index and shard is downloaded once, checked, and kept on the local disk."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from latentvae.data.storage import ATTEMPTS, filesystem, with_attempts
from latentvae.errors import UserError, one_line
from latentvae.files import TEMPORARY_MARK, atomic_file, sha256_file
from latentvae.latents.reading.access import store_changed
from latentvae.latents.store.files import LatentStore
from latentvae.latents.store.plan import Plan
from latentvae.latents.store.records import FileRecord

T = TypeVar("T")

RECORDS_TOGETHER = 512  # commit records asked for at once
ABANDONED_SECONDS = 24 * 3600.0  # after which a temporary file in the cache belongs to nobody


class RemoteFiles:
    """The files of a store that fsspec reads.

    The cache is addressed by content: `<cache_dir>/<sha256><suffix>`. So it is never stale, stores may share it, and a
    file that was downloaded once is not asked for again, whoever asks: processes wait for each other's downloads.

    Args:
        url: such as s3://bucket/store, hf://datasets/owner/name/store, https://host/store.
        cache_dir: None: `latentvae` in $XDG_CACHE_HOME or ~/.cache.
        max_cache_bytes: of the files in cache_dir; the least recently used go first. None: no limit.
    """

    def __init__(self, url: str, cache_dir: str | Path | None = None, max_cache_bytes: int | None = None) -> None:
        if max_cache_bytes is not None and max_cache_bytes < 1:
            raise UserError(f"max_cache_bytes is {max_cache_bytes}: it must be at least 1")
        self.name = url.rstrip("/")
        self.cache = Path(cache_dir).expanduser() if cache_dir is not None else default_cache()
        self.max_bytes = max_cache_bytes

    @contextmanager
    def small_files(self) -> Iterator[LatentStore]:
        """A temporary local copy of manifest, plan and commit records, so that all are of one moment."""
        with tempfile.TemporaryDirectory(prefix="latentvae-") as folder:
            store = LatentStore(folder)
            try:
                self._copy_manifest(store)
                for name, expected in store.read_manifest().plan.items():
                    self._copy_checked(f"plan/{name}", store.plan_folder / name, expected)
                self._copy_records(store)
                yield store
            except UserError as error:
                raise UserError(str(error).replace(str(store.folder), self.name)) from error

    def use(self, name: str, expected: FileRecord, reader: Callable[[Path], T]) -> T:
        """What `reader` makes of the cached file, which is downloaded first where it is not there.

        Meanwhile nobody removes it; on Linux and macOS what is mapped stays readable after that.
        """
        path = self.cache / f"{expected.sha256}{Path(name).suffix}"
        with self._lock(path):
            if not self._is_cached(path, expected):
                self._copy_checked(name, path, expected)
                self._evict(path)
            with suppress(OSError):
                os.utime(path)  # its last use: access times are switched off on many machines
            return reader(path)

    def _lock(self, path: Path, timeout: float = -1) -> Any:
        """Of one cached file, among processes; freed by the system where its holder dies."""
        from filelock import FileLock

        locks = self.cache / "locks"
        try:
            locks.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to the cache {self.cache}: {error.strerror or error}") from error
        return FileLock(locks / path.name, timeout=timeout)

    @staticmethod
    def _is_cached(path: Path, expected: FileRecord) -> bool:
        try:
            return path.stat().st_size == expected.num_bytes
        except FileNotFoundError:
            return False

    def _copy_manifest(self, store: LatentStore) -> None:
        try:
            content = self._asked(lambda system, root: system.cat_file(f"{root}/manifest.json"))
        except FileNotFoundError as error:
            raise UserError(f"{self.name} is not a latent store: it has no manifest.json") from error
        store.manifest_path.write_bytes(content)

    def _copy_records(self, store: LatentStore) -> None:
        names = [store.relative(store.record_path(unit.bucket, unit.number)) for unit in Plan(store.plan_folder).units]
        for start in range(0, len(names), RECORDS_TOGETHER):
            part = names[start : start + RECORDS_TOGETHER]
            for name, content in self._cat(part).items():
                if isinstance(content, bytes):
                    path = store.folder / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
                elif not isinstance(content, FileNotFoundError):  # a unit that is not encoded yet has no record
                    raise UserError(f"{self.name}/{name} cannot be read: {one_line(content)}") from content

    def _cat(self, names: list[str]) -> dict[str, bytes | Exception]:
        """Contents by name; file systems that can, read them at the same time."""

        def read(system: Any, root: str) -> dict[str, bytes | Exception]:
            found = system.cat([f"{root}/{name}" for name in names], on_error="return")
            return {name: found[f"{root}/{name}"] for name in names}

        return self._asked(read)

    def _copy_checked(self, name: str, path: Path, expected: FileRecord) -> None:
        """Download one file to `path`, whole and with the bytes that were committed, or raise UserError."""
        for attempt in range(ATTEMPTS):
            try:
                with atomic_file(path) as temporary:
                    self._download(name, temporary)
                    size = temporary.stat().st_size
                    if size != expected.num_bytes or sha256_file(temporary) != expected.sha256:
                        raise _OtherBytes(f"{size} bytes came, {expected.num_bytes} with another hash were committed")
                return
            except FileNotFoundError as error:
                raise store_changed(self.name, name) from error
            except _OtherBytes as error:
                if attempt == ATTEMPTS - 1:
                    raise UserError(f"{self.name}/{name} is damaged: {error}: run latentvae verify on it") from error
            except OSError as error:
                raise UserError(f"cannot write to the cache {path.parent}: {error.strerror or error}") from error

    def _download(self, name: str, target: Path) -> None:
        self._asked(lambda system, root: system.get_file(f"{root}/{name}", str(target)))

    def _asked(self, request: Callable[[Any, str], T]) -> T:
        """Ask the file system, again where the network fails. FileNotFoundError, or UserError for all else."""

        def ask() -> T:
            system, root = filesystem(self.name)  # kept by fsspec, and made anew in a forked process
            return request(system, root.rstrip("/"))

        try:
            return with_attempts(ask)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UserError(f"{self.name} cannot be read: {error}") from error

    def _evict(self, newest: Path) -> None:
        """Remove the least recently used files beyond max_bytes, but for those that are just being read."""
        from filelock import Timeout

        if self.max_bytes is None:
            return
        found = []
        for path in self.cache.iterdir():
            with suppress(FileNotFoundError):
                status = path.stat()
                if TEMPORARY_MARK in path.name:
                    if time.time() - status.st_mtime > ABANDONED_SECONDS:
                        path.unlink()
                elif path.is_file():
                    found.append((status.st_mtime_ns, status.st_size, path))
        excess = sum(size for _, size, _ in found) - self.max_bytes
        for _, size, path in sorted(found):
            if excess > 0 and path != newest:
                with suppress(OSError, Timeout), self._lock(path, timeout=0):  # OSError: Windows keeps what is mapped
                    path.unlink()
                    excess -= size


class _OtherBytes(Exception):
    """A download that is not what was committed."""


def default_cache() -> Path:
    """Of the user, unless another folder is named."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "latentvae" / "stores"
