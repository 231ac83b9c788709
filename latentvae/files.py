"""Files that are either whole or absent: write to a temporary name, flush to disk, rename."""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latentvae.errors import UserError

TEMPORARY_MARK = ".tmp-"  # every unfinished file or folder of ours has it in its name


def temporary_path(path: Path, owner: str | None = None) -> Path:
    """A name beside `path` that nothing else has, for what is not whole yet; it ends with `owner`, where there is one.

    An owner is asked for where several processes write into one folder, and leftovers of the dead must be told apart.
    """
    unique = f"{os.getpid()}-{secrets.token_hex(4)}"
    return path.with_name(f".{path.name}{TEMPORARY_MARK}{unique}{f'-{owner}' if owner else ''}")


def fsync(path: Path) -> None:
    """Flush one file, or a folder's entries where the platform can open a folder (not on Windows)."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename_new(source: Path, target: Path) -> bool:
    """Move a file to a name that is free; False, and nothing done, where it is taken."""
    try:
        os.link(source, target)  # unlike a rename, it fails where the name is taken
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: there two that look at the same instant may both go on
        if target.exists():
            return False
        os.rename(source, target)
        return True
    source.unlink(missing_ok=True)
    return True


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write; on success it becomes `path`, on an error it is removed.

    A crash at any instant leaves either the old file or the new one. Its permissions are those that the umask gives,
    whatever the writer chose: safetensors makes its files readable by their owner alone.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)
        fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success it becomes `path`, on an error it is removed.

    With `overwrite` an existing folder is moved aside first and deleted last (no system call exchanges two folders
    everywhere: a crash between the two renames leaves it under its temporary name); without it, it is refused. Files
    get the permissions of the umask, as in `atomic_file`.
    """
    path = Path(path).absolute()
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already: choose another folder or allow overwriting")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    temporary.mkdir()
    try:
        yield temporary
        mode = temporary.stat().st_mode & 0o666
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                file.chmod(mode)
            fsync(file)
        fsync(temporary)
        old = None
        if path.exists():
            old = temporary_path(path)
            os.rename(path, old)
        os.rename(temporary, path)
        fsync(path.parent)
        if old is not None:
            shutil.rmtree(old)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON atomically; NaN and infinity are refused, since no standard reader takes them."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def canonical_json(value: Any) -> bytes:
    """The bytes that stand for `value` in a hash: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def sha256_file(path: str | Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(folder: str | Path) -> Path:
    """Create `folder` and prove that a file can be written in it, or raise a UserError that names it."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = temporary_path(folder / "probe")
        probe.touch()
        probe.unlink(missing_ok=True)  # another process may have swept it
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}; choose another --out") from error
    return folder
