"""Who works on what in a store that several processes write: lease files, with a heartbeat and an end.

A lease is a file that appears whole, under a name that only one process can take. Its owner touches it again and again;
one that was not touched for `seconds`, by the clock of the file server, is over and may be taken by another. On the
same host a dead owner (its process number and start are recorded) frees it at once. An owner that was frozen and wakes
sees that its lease is another's; what it may have written by then does no harm (store.py).
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from latentvae.errors import UserError
from latentvae.files import TEMPORARY_MARK, rename_new, temporary_path

START_TOLERANCE = 2.0  # seconds; without a count since boot, a start read twice differs by the clock's adjustment
POLL = 0.2  # seconds between looks at a lease that another holds
SUFFIX = ".lease"
PLAN_LEASE = "plan"  # of who writes the manifest and the plan


@dataclass(frozen=True)
class Lease:
    """Held by this process until released, or until another takes it over because it was not touched."""

    path: Path
    token: str

    def is_held(self) -> bool:
        """Whether the file still is ours."""
        return (_read(self.path) or {}).get("token") == self.token

    def require_held(self) -> None:
        """UserError where it is another's, or was removed."""
        if not self.is_held():
            raise UserError(f"{self.path} was removed or taken by another process: this one stops without writing")


class Leases:
    """The leases of one store folder, and the heartbeat of those that this process holds.

    seconds: after which a lease that nobody touches is over. Raises OSError where the folder cannot be written.
    """

    def __init__(self, folder: Path, seconds: float = 300.0) -> None:
        self.folder, self.seconds = folder, seconds
        self._owner: dict[str, Any] = {
            "host": socket.gethostname(),
            "namespace": _namespace(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
        }
        self._held: dict[Path, Lease] = {}
        self._guard = threading.Lock()
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None

    def path(self, name: str) -> Path:
        """Of the file of that lease."""
        return self.folder / f"{name}{SUFFIX}"

    def claim(self, name: str) -> Lease | None:
        """Take the lease of that name; None where another process holds it."""
        path = self.path(name)
        token = secrets.token_hex(8)
        while True:
            owner, age = _read(path), self._age(path)
            if owner is not None and owner.get("token") == token:
                break  # published, and the file server's answer was lost
            if owner is not None and not self._is_over(owner, age):
                return None
            if owner is not None and not self._remove(path, owner):
                continue
            if self._publish(path, token):
                break
        lease = Lease(path, token)
        with self._guard:
            self._held[path] = lease
            if self._heart is None:
                self._heart = threading.Thread(target=self._beat, name="leases", daemon=True)
                self._heart.start()
        return lease

    def _publish(self, path: Path, token: str) -> bool:
        temporary = temporary_path(path, token)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._owner | {"token": token}), encoding="utf-8")
            return rename_new(temporary, path)
        except FileNotFoundError:
            return False  # the folder was empty and removed, or our temporary file swept away: once more
        except FileExistsError:
            if self.folder.exists():
                raise  # a file has its name
            return False  # removed between the two looks of mkdir: once more
        finally:
            temporary.unlink(missing_ok=True)

    def release(self, lease: Lease) -> None:
        """Give it back; nothing where it is another's by now."""
        with self._guard:
            self._held.pop(lease.path, None)
        owner = _read(lease.path)
        if owner is not None and owner.get("token") == lease.token:
            self._remove(lease.path, owner)

    @contextmanager
    def wait_for(self, name: str, say: Callable[[str], None]) -> Iterator[Lease]:
        """Hold the lease of that name; waits for whoever holds it, and says so once."""
        told = False
        while (lease := self.claim(name)) is None:
            if not told and (holder := self.holder(name)):
                say(f"waiting for {holder}")
                told = True
            time.sleep(POLL)
        try:
            yield lease
        finally:
            self.release(lease)

    def holder(self, name: str) -> str | None:
        """Who holds a lease, for people; None where nobody does."""
        owner = _read(self.path(name))
        return None if owner is None else f"process {owner.get('pid', 'unknown')} on {owner.get('host', 'unknown')}"

    def live_tokens(self) -> set[str]:
        """Of all leases that are not over, of any process: temporary files that end with another one are leftovers."""
        tokens = set()
        for path in self.folder.glob(f"*{SUFFIX}"):
            owner = _read(path)
            if owner is not None and not self._is_over(owner, self._age(path)):
                tokens.add(str(owner.get("token")))
        return tokens

    def sweep(self) -> None:
        """Remove leases that are over, what was left half done, and the folder where no lease is left."""
        for path in self.folder.glob(f"*{SUFFIX}"):
            owner = _read(path)
            if owner is not None and self._is_over(owner, self._age(path)):
                self._remove(path, owner)
        live = self.live_tokens()
        for path in self.folder.glob(f".*{TEMPORARY_MARK}*"):
            if not path.name.endswith(tuple(live)) and self._age(path) > self.seconds:
                path.unlink(missing_ok=True)
        self._tidy()

    def close(self) -> None:
        """Release everything and end the heartbeat."""
        self._stop.set()
        for lease in list(self._held.values()):
            self.release(lease)
        if self._heart is not None:
            self._heart.join()
            self._heart = None
        self._tidy()

    def _tidy(self) -> None:
        """Where nobody holds a lease, remove the folder with all that killed processes left half done in it."""
        if not any(self.folder.glob(f"*{SUFFIX}")):
            for path in self.folder.glob(f".*{TEMPORARY_MARK}*"):
                path.unlink(missing_ok=True)  # who is about to claim notices, and does it once more
        with suppress(OSError):
            self.folder.rmdir()  # where it is empty

    def _beat(self) -> None:
        while not self._stop.wait(self.seconds / 6):
            with self._guard:
                held = list(self._held.values())
            for lease in held:
                with suppress(OSError):
                    if lease.is_held():
                        os.utime(lease.path)

    def _age(self, path: Path) -> float:
        """Seconds since a file was touched, by the clock that stamps files: not by ours, which may be off."""
        try:
            touched = path.stat().st_mtime
            probe = temporary_path(self.folder / "clock")
            probe.touch()
            now = probe.stat().st_mtime
            probe.unlink(missing_ok=True)
        except FileNotFoundError:
            return 0.0
        return now - touched

    def _is_over(self, owner: dict[str, Any], age: float) -> bool:
        return age > self.seconds or _is_dead(owner, self._owner)

    def _remove(self, path: Path, owner: dict[str, Any]) -> bool:
        """Remove a lease that is over; False where it has another owner by now."""
        aside = temporary_path(path)
        try:
            os.rename(path, aside)
        except FileNotFoundError:
            return True
        if _read(aside) != owner:  # between reading and renaming another process had taken it: give it back
            rename_new(aside, path)
            aside.unlink(missing_ok=True)
            return False
        aside.unlink(missing_ok=True)
        return True


def _read(path: Path) -> dict[str, Any] | None:
    """None where there is no file; an empty owner where it is not readable (damaged)."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_dead(owner: dict[str, Any], us: dict[str, Any]) -> bool:
    """Only of an owner on our host, whose process number means the same to us."""
    pid = owner.get("pid")
    if (owner.get("host"), owner.get("namespace")) != (us["host"], us["namespace"]) or not isinstance(pid, int):
        return False
    try:
        same = abs(_started(pid) - float(owner.get("started", 0.0))) <= START_TOLERANCE
        return not same or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return True
    except (psutil.AccessDenied, PermissionError):
        return False


def _namespace() -> int | None:
    """Within which process numbers are unique: containers may share a host's name and count on their own."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # not Linux
        return None


def _started(pid: int) -> float:
    """When a process started, in seconds since boot where the system tells: a clock that is set does not move that."""
    if not os.path.exists("/proc/self/stat"):
        return psutil.Process(pid).create_time()
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")  # proc(5): starttime, the 20th after the name
