"""One writer per store: an exclusive lock file that names its owner, and is taken over when that one is dead."""

import json
import os
import secrets
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from latentvae.errors import UserError
from latentvae.files import temporary_path

START_TOLERANCE = 2.0  # seconds; a process start read twice differs by the clock's adjustment at most


class ExclusiveLock:
    """`with ExclusiveLock(path):` or a UserError that names who holds it.

    The file appears whole and under a name that is free, so of two processes one wins and a kill at any instant leaves
    none or one that names its owner. It records host, process and process start: on the same host a dead owner (or
    another process with its number) frees it at once. An owner on another host cannot be looked at, so there the user
    decides. Raises OSError where the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "token": secrets.token_hex(8),
        }

    def __enter__(self) -> Self:
        while not self._publish():
            self._remove_dead()
        for aside in self.path.parent.glob(f"{self.path.name}.*"):  # of one that was killed while it took a lock over
            owner = _read(aside)
            if owner is not None and _is_dead(owner, self.owner["host"]):
                aside.unlink(missing_ok=True)
        return self

    def _publish(self) -> bool:
        """Put the file there, whole; False where one is there."""
        temporary = temporary_path(self.path)
        try:
            temporary.write_text(json.dumps(self.owner), encoding="utf-8")
            return rename_new(temporary, self.path) and self.is_held()
        except FileNotFoundError:
            if not self.path.parent.is_dir():
                raise
            return False  # who holds the lock has swept our temporary file away
        finally:
            temporary.unlink(missing_ok=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_held():
            self.path.unlink()

    def is_held(self) -> bool:
        """Whether the file still is ours."""
        return _read(self.path) == self.owner

    def require_held(self) -> None:
        """Before a commit: UserError where somebody removed or took the lock."""
        if not self.is_held():
            raise UserError(f"{self.path} was removed or taken by another process: this one stops without committing")

    def _remove_dead(self) -> None:
        """Remove the file of a dead owner, or raise a UserError."""
        owner = _read(self.path)
        if owner is None:
            return  # gone meanwhile
        if not _is_dead(owner, self.owner["host"]):
            who = f"process {owner.get('pid', 'unknown')} on {owner.get('host', 'an unknown host')}"
            raise UserError(
                f"{self.path.parent} is being written by {who}; wait for it, "
                f"or delete {self.path.name} there if it is dead"
            )
        aside = self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        if _read(aside) != owner:  # between reading and renaming another process had taken over: give it back
            os.rename(aside, self.path)
            return
        aside.unlink()


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


def _read(path: Path) -> dict[str, Any] | None:
    """None where there is no file; an empty owner where it is not readable (being written, or damaged)."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_dead(owner: dict[str, Any], host: object) -> bool:
    if owner.get("host") != host or not isinstance(owner.get("pid"), int):
        return False
    try:
        process = psutil.Process(owner["pid"])
        same = abs(process.create_time() - float(owner.get("started", 0.0))) <= START_TOLERANCE
        return not same or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False
