"""Leases: one owner at a time, and an end for owners that died, were frozen, or sit on another host."""

import json
import multiprocessing
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from latentvae.errors import UserError
from latentvae.files import TEMPORARY_MARK
from latentvae.latents.store import lease as lease_module
from latentvae.latents.store.lease import Lease, Leases

ROOT = Path(__file__).parents[3]


@pytest.fixture
def leases(tmp_path):
    held = Leases(tmp_path / "leases")
    yield held
    held.close()


def owner_of(lease):
    return json.loads(lease.path.read_text())


def put(leases, name="unit", *, age=0.0, **changes):
    """Write the lease of another owner, last touched `age` seconds ago; `changes` to who we are."""
    leases.folder.mkdir(exist_ok=True)
    path = leases.folder / f"{name}.lease"
    path.write_text(json.dumps(leases._owner | {"token": secrets.token_hex(8)} | changes))
    touch(path, age)
    return path


def touch(path, age):
    moment = time.time() - age
    os.utime(path, (moment, moment))


def dead_process():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_only_one_holds_a_lease_until_it_is_released(leases, tmp_path):
    other = Leases(tmp_path / "leases")
    first = leases.claim("unit")
    assert first is not None and first.is_held()
    assert other.claim("unit") is None and leases.claim("unit") is None
    second = other.claim("another")
    assert second is not None and second.is_held()
    assert leases.live_tokens() == {first.token, second.token}
    assert leases.holder("unit") == f"process {os.getpid()} on {socket.gethostname()}"
    leases.release(first)
    assert not first.is_held() and leases.holder("unit") is None
    again = other.claim("unit")
    assert again is not None and again.token != first.token
    other.close()
    assert not (tmp_path / "leases").exists()


def test_exactly_one_of_many_threads_wins_each_lease(tmp_path):
    contenders = [Leases(tmp_path / "leases") for _ in range(4)]
    barrier = threading.Barrier(len(contenders))

    def race(contender):
        won = {}
        for number in range(250):
            barrier.wait(60)
            if (lease := contender.claim(f"u{number}")) is not None:
                won[number] = lease
        return won

    with ThreadPoolExecutor(len(contenders)) as pool:
        results = list(pool.map(race, contenders))
    assert sorted(number for won in results for number in won) == list(range(250))
    assert all(lease.is_held() for won in results for lease in won.values())
    for contender in contenders:
        contender.close()
    assert not (tmp_path / "leases").exists()


def claim_all(folder, start, results):
    """What a process of the race does: claim every name and say what it got."""
    leases = Leases(folder)
    start.wait(60)
    won = [number for number in range(1000) if leases.claim(f"u{number}") is not None]
    results.put(won)
    start.wait(60)  # nobody is dead before all have tried
    leases.close()


def test_exactly_one_of_several_processes_wins_each_lease(tmp_path):
    context = multiprocessing.get_context("fork" if os.name != "nt" else "spawn")
    start, results = context.Barrier(3), context.Queue()
    processes = [context.Process(target=claim_all, args=(tmp_path / "leases", start, results)) for _ in range(3)]
    for process in processes:
        process.start()
    won = [results.get(timeout=100) for _ in processes]
    for process in processes:
        process.join(60)
    assert sorted(number for numbers in won for number in numbers) == list(range(1000))
    assert not (tmp_path / "leases").exists()


@pytest.mark.parametrize("round_", range(20))
def test_a_takeover_by_several_leaves_one_owner(tmp_path, round_):
    """All find the same dead owner at once. Whoever loses knows it when it asks, before it writes."""
    contenders = [Leases(tmp_path / "leases") for _ in range(6)]
    put(contenders[0], pid=dead_process() if round_ == 0 else 2**22 + 1)
    barrier = threading.Barrier(len(contenders))

    def race(contender):
        barrier.wait(60)
        return contender.claim("unit")

    with ThreadPoolExecutor(len(contenders)) as pool:
        claims = list(pool.map(race, contenders))
    holders = [claim for claim in claims if claim is not None and claim.is_held()]
    assert len(holders) == 1
    assert contenders[0].live_tokens() == {holders[0].token}
    for contender in contenders:
        contender.close()
    assert not (tmp_path / "leases").exists()


def test_the_heartbeat_keeps_a_lease(tmp_path):
    leases, other = Leases(tmp_path / "leases", seconds=0.6), Leases(tmp_path / "leases", seconds=0.6)
    lease = leases.claim("unit")
    other._owner["host"] = "elsewhere"  # so that only the age of the lease counts
    for _ in range(8):
        time.sleep(0.2)
        assert other.claim("unit") is None
    assert lease.is_held()
    leases._stop.set()  # the heart stops
    while (taken := other.claim("unit")) is None:
        time.sleep(0.05)
    assert taken.is_held() and not lease.is_held()
    leases.close()
    assert taken.is_held(), "who lost a lease must not remove that of its successor"
    other.close()


@pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"namespace": 1}], ids=["host", "container"])
def test_an_owner_that_we_cannot_look_at_is_respected_until_its_lease_is_over(leases, change):
    path = put(leases, pid=2**22 + 1, **change)
    assert leases.claim("unit") is None
    touch(path, leases.seconds - 30)
    assert leases.claim("unit") is None
    touch(path, leases.seconds + 30)
    lease = leases.claim("unit")
    assert lease is not None and lease.is_held() and owner_of(lease)["pid"] == os.getpid()


def test_only_the_clock_that_stamps_files_counts(leases, monkeypatch):
    path = put(leases, host="elsewhere")
    ours = put(leases, "ours")  # of this very process
    now = time.time()
    for wrong in (now + 1e6, now - 1e6):
        monkeypatch.setattr(time, "time", lambda wrong=wrong: wrong)
        monkeypatch.setattr("psutil.boot_time", lambda wrong=wrong: wrong - 3600)
        assert leases.claim("unit") is None and leases.claim("ours") is None
    monkeypatch.undo()
    touch(path, leases.seconds + 1)
    touch(ours, leases.seconds + 1)
    monkeypatch.setattr(time, "time", lambda: now - 1e6)
    assert leases.claim("unit") is not None and leases.claim("ours") is not None


def test_a_dead_process_of_this_host_frees_its_lease_at_once(leases):
    path = put(leases, pid=dead_process())
    assert leases.live_tokens() == set()
    lease = leases.claim("unit")
    assert lease is not None and lease.path == path and lease.is_held()


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_killed_process_frees_its_lease_even_before_it_is_waited_for(leases):
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom latentvae.latents.store.lease import Leases\n"
        "leases = Leases(Path(sys.argv[1]))\nleases.claim('unit')\nprint(flush=True)\ntime.sleep(100)"
    )
    command = [sys.executable, "-c", script, str(leases.folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    process.stdout.readline()
    assert leases.claim("unit") is None
    process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while (lease := leases.claim("unit")) is None:  # it is a zombie now
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert lease.is_held()
    process.wait()
    process.stdout.close()


def test_a_recycled_process_number_is_not_the_owner(leases):
    mine = leases._owner["started"]
    put(leases, started=mine - 1000)
    assert leases.claim("unit") is not None
    put(leases, "same", started=mine + 0.01)
    assert leases.claim("same") is None


def test_an_unreadable_lease_is_respected_until_it_is_over(leases):
    for name, content in (("empty", ""), ("text", "half a f"), ("list", "[1, 2]"), ("binary", "\x00\xff")):
        path = put(leases, name)
        path.write_text(content, encoding="latin-1")
        assert leases.claim(name) is None
        assert leases.holder(name) == "process unknown on unknown"
        touch(path, leases.seconds + 1)
        assert leases.claim(name) is not None


def test_who_was_overtaken_sees_it_and_takes_nothing_back(leases, tmp_path):
    lease = leases.claim("unit")
    successor = put(leases, host="elsewhere")
    assert not lease.is_held()
    with pytest.raises(UserError, match=r"unit\.lease was removed or taken by another process.*stops without writing"):
        lease.require_held()
    leases.release(lease)
    assert successor.exists()
    successor.unlink()
    with pytest.raises(UserError, match="was removed or taken"):
        lease.require_held()
    assert leases.claim("unit").is_held()


def test_a_release_that_comes_too_late_gives_the_successor_its_lease_back(leases, monkeypatch):
    """Frozen between looking and removing: by then the file is another's."""
    lease = leases.claim("unit")
    ours = owner_of(lease)
    successor = put(leases, host="elsewhere")
    content, touched = successor.read_text(), successor.stat().st_mtime_ns
    looks = iter([ours])
    read = lease_module._read
    monkeypatch.setattr(lease_module, "_read", lambda path: next(looks, None) or read(path))
    leases.release(lease)
    assert successor.read_text() == content and successor.stat().st_mtime_ns == touched
    assert [path.name for path in leases.folder.iterdir()] == ["unit.lease"]
    successor.unlink()


def test_waiting_says_for_whom_once_and_ends_with_the_lease(leases, tmp_path):
    other = Leases(tmp_path / "leases")
    lease = other.claim("plan")
    said = []
    timer = threading.Timer(0.5, other.release, [lease])
    timer.start()
    with leases.wait_for("plan", said.append) as mine:
        assert mine.is_held() and not lease.is_held()
    assert said == [f"waiting for process {os.getpid()} on {socket.gethostname()}"]
    assert not mine.is_held()
    timer.join()
    other.close()


def test_live_tokens_and_sweep(leases):
    mine = leases.claim("mine")
    other = put(leases, "other", host="elsewhere")
    over = put(leases, "over", host="elsewhere", age=leases.seconds + 1)
    dead = put(leases, "dead", pid=2**22 + 1)
    live = {mine.token, json.loads(other.read_text())["token"]}
    assert leases.live_tokens() == live
    old, new, live_one = (leases.folder / f".x.lease{TEMPORARY_MARK}1-{name}" for name in ("old", "new", mine.token))
    for path in (old, new, live_one):
        path.write_text("")
        touch(path, 0 if path == new else leases.seconds + 1)
    leases.sweep()
    assert sorted(leases.folder.iterdir()) == sorted([mine.path, other, new, live_one])
    assert leases.live_tokens() == live and not over.exists() and not dead.exists()
    other.unlink()
    leases.close()
    assert not leases.folder.exists(), "what killed processes left half done goes with the last lease"


def test_the_folder_goes_with_the_last_lease_and_comes_back(leases, tmp_path):
    other = Leases(tmp_path / "leases")
    lease, another = leases.claim("a"), other.claim("b")
    leases.release(lease)
    leases.close()
    assert another.path.exists()
    other.release(another)
    other.sweep()
    assert not (tmp_path / "leases").exists()
    again = Leases(tmp_path / "leases")
    assert again.claim("a") is not None
    again.close()


@pytest.mark.parametrize("other_is_first", [False, True])
def test_without_hard_links_there_is_one_owner_too(leases, tmp_path, monkeypatch, other_is_first):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    other = Leases(tmp_path / "leases")
    if other_is_first:
        put(leases, pid=2**22 + 1)  # a takeover
    lease = leases.claim("unit")
    assert lease.is_held() and other.claim("unit") is None
    leases.release(lease)
    assert other.claim("unit").is_held()
    other.close()
    assert not (tmp_path / "leases").exists()


def test_a_lost_answer_of_the_file_server_is_no_foreign_lease(leases, monkeypatch):
    """NFS may make a link and, after a repeated request, answer that the name is taken."""
    link = os.link

    def link_and_deny(source, target):
        link(source, target)
        raise FileExistsError(17, "File exists")

    monkeypatch.setattr(os, "link", link_and_deny)
    assert leases.claim("unit").is_held()


def test_a_folder_that_vanishes_again_and_again_stops_nobody(tmp_path):
    """Others remove it whenever it is empty."""
    leases = Leases(tmp_path / "leases")
    done = threading.Event()

    def remove():
        while not done.is_set():
            with suppress(OSError):
                (tmp_path / "leases").rmdir()

    thread = threading.Thread(target=remove)
    thread.start()
    try:
        for number in range(100):
            lease = leases.claim(f"u{number}")
            assert isinstance(lease, Lease) and lease.is_held()
            leases.release(lease)
    finally:
        done.set()
        thread.join()
    leases.close()


def test_a_folder_that_vanishes_between_the_two_looks_of_mkdir_stops_nobody(leases, monkeypatch):
    """`mkdir` finds it there; frozen just then, the process wakes when the last other one has removed it."""
    real = os.mkdir
    vanished = []

    def mkdir(path, *arguments):
        if not vanished and Path(path) == leases.folder:
            vanished.append(path)
            raise FileExistsError(17, "File exists")  # and it is gone when the error is looked at
        real(path, *arguments)

    monkeypatch.setattr(os, "mkdir", mkdir)
    assert leases.claim("unit").is_held() and vanished


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "leases").write_text("mine")
    with pytest.raises((FileExistsError, NotADirectoryError)):
        Leases(tmp_path / "leases").claim("unit")
    assert (tmp_path / "leases").read_text() == "mine"
