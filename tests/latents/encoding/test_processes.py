"""Several processes on one store: whoever comes, goes, dies or freezes, the bytes are those of one that had peace."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from PIL import Image

from latentvae.latents.encoding import engine, resume
from latentvae.latents.encoding.encode import EncodeJob, encode_dataset
from latentvae.latents.encoding.engine import encode_here
from latentvae.latents.encoding.launch import Launch
from latentvae.latents.encoding.settings import resolved_config
from latentvae.latents.operating.verify import verify_store
from latentvae.latents.store.files import UncommittedUnit
from latentvae.latents.store.lease import Leases
from latentvae.latents.store.plan import Plan
from tests.latents.stores import COUNT, SETTINGS, Slow, contents, latents_of, rows_of, start, tiny_vae, write_pictures

pytestmark = [pytest.mark.multiprocess, pytest.mark.skipif(os.name == "nt", reason="no SIGSTOP, no torchrun")]
ROOT = Path(__file__).parents[3]


def require_whole(store, undisturbed):
    assert contents(store) == undisturbed
    assert len(rows_of(store)) == COUNT
    assert verify_store(store).is_whole


def committed(store):
    return len(list(store.glob("shards/*/u*.json")))


def wait_for(condition, process=None, seconds=100):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        assert process is None or process.is_alive(), "it ended early"
        time.sleep(0.005)


def torchrun(processes, source, store, seconds):
    """Start so many processes that encode a folder, with a pause before every image."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *launcher, "-m", "tests.latents.stores", str(source), str(store), str(seconds)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)


def end(launch):
    """Its standard error, and its exit code."""
    said = launch.communicate(timeout=200)[1].decode()
    return said, launch.returncode


def kill_all(launch):
    for process in [psutil.Process(launch.pid), *psutil.Process(launch.pid).children(recursive=True)]:
        process.kill()
    end(launch)


def owners(store):
    """Process numbers in the leases."""
    found = set()
    for path in store.glob("leases/u*.lease"):
        try:
            found.add(json.loads(path.read_text())["pid"])
        except FileNotFoundError:
            continue  # released since
    return found


def owner_of(store, unit):
    return json.loads((store / "leases" / f"u{unit:06d}.lease").read_text())["pid"]


def test_one_then_three_then_two_processes(pictures, undisturbed, tmp_path):
    store = tmp_path / "store"
    first = torchrun(1, pictures, store, 0.05)
    wait_for(lambda: committed(store) >= 3)
    kill_all(first)
    before = committed(store)
    second = torchrun(3, pictures, store, 0.3)
    wait_for(lambda: len(owners(store)) == 3 and committed(store) >= before + 3)
    kill_all(second)
    assert before + 3 <= committed(store) < 20
    said, code = end(torchrun(2, pictures, store, 0.0))
    assert code == 0, said
    require_whole(store, undisturbed)


def test_one_of_two_killed_ends_the_launch_and_a_new_one_completes(pictures, undisturbed, tmp_path):
    store = tmp_path / "store"
    launch = torchrun(2, pictures, store, 0.3)
    wait_for(lambda: len(owners(store)) == 2 and committed(store) >= 2)
    os.kill(max(owners(store)), signal.SIGKILL)
    said, code = end(launch)
    assert code != 0 and "Signal 9 (SIGKILL)" in said
    assert committed(store) < 20
    said, code = end(torchrun(2, pictures, store, 0.0))
    assert code == 0, said
    require_whole(store, undisturbed)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_each_process_of_a_launch_would_do_everything_alone(pictures, undisturbed, tmp_path, index):
    """Whichever units are left, and whichever of the others are gone."""
    store, config = tmp_path / "store", resolved_config(None, {k: v for k, v in SETTINGS.items() if k != "progress"})
    job = EncodeJob.prepare(Slow(pictures), tiny_vae(), store, config, Launch(torch.device("cpu")))
    leases = Leases(job.store.leases)
    opened = job.open(leases)
    encoder = job.unit_encoder(opened)
    encoder.encode_units([0, 1, 4, 6, 7, 12])
    encode_here(encoder, Launch(torch.device("cpu"), index, 3), False)
    assert encoder.work.num_units == 20 and encoder.work.num_images == COUNT
    assert opened.finish() is not None
    leases.close()
    require_whole(store, undisturbed)


def test_an_error_of_the_first_process_ends_the_others(pictures, tmp_path):
    said, code = end(torchrun(2, tmp_path / "nowhere", tmp_path / "store", 0.0))
    assert code != 0 and "error: " in said


@pytest.mark.parametrize("launchers", [2, 4])
def test_several_launchers_on_one_directory_at_once(pictures, undisturbed, tmp_path, launchers):
    store = tmp_path / "store"
    processes = [start(Slow(pictures, 0.05), store) for _ in range(launchers)]
    wait_for(lambda: len(owners(store)) == launchers)
    for process in processes:
        process.join(100)
    assert [process.exitcode for process in processes] == [0] * launchers
    require_whole(store, undisturbed)


@pytest.mark.parametrize("is_woken_early", [True, False], ids=["woken-early", "woken-late"])
@pytest.mark.parametrize("units", [0, 2, 5])
def test_a_process_frozen_past_its_lease_loses(pictures, undisturbed, tmp_path, units, is_woken_early):
    store = tmp_path / "store"
    frozen = start(Slow(pictures, 0.05), store, lease_seconds=1)
    wait_for(lambda: committed(store) >= units and owners(store), frozen)
    os.kill(frozen.pid, signal.SIGSTOP)
    other = start(Slow(pictures, 0.02), store, lease_seconds=1)
    if is_woken_early:
        wait_for(lambda: committed(store) >= units + 4, other)
    else:
        other.join(100)
        assert other.exitcode == 0
        require_whole(store, undisturbed)
    os.kill(frozen.pid, signal.SIGCONT)
    for process in (frozen, other):
        process.join(100)
        assert process.exitcode == 0
    require_whole(store, undisturbed)


def freeze():
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.2)  # another thread may be the first to stop: this one must not get any further


class Freezes:
    """Patches a function so that the process stops once, before or after a call of it, as if it slept right there."""

    def __init__(self, name, call, *, before):
        self.name, self.call, self.before = name, call, before

    def __call__(self):
        owner, name = FUNCTIONS[self.name]
        real, calls = getattr(owner, name), []

        def patched(*arguments, **options):
            calls.append(None)
            is_it = len(calls) == self.call
            if is_it and self.before:
                freeze()
            result = real(*arguments, **options)
            if is_it and not self.before:
                freeze()
            return result

        setattr(owner, name, patched)


FUNCTIONS = {
    "write_unit": (engine, "write_unit"),
    "publish_unit": (UncommittedUnit, "publish"),
    "plan": (resume, "plan_new_images"),
    "publish_plan": (resume, "publish"),
}
MOMENTS = {
    "before-writing": (Freezes("write_unit", 3, before=True), 0),
    "before-looking-at-its-lease": (Freezes("write_unit", 3, before=False), 0),
    "before-the-record": (Freezes("publish_unit", 3, before=True), 0),
    "after-the-record": (Freezes("publish_unit", 3, before=False), 0),
    "before-the-plan": (Freezes("plan", 1, before=True), 2),
    "before-publishing-the-plan": (Freezes("publish_plan", 1, before=True), 2),
    "after-publishing-the-plan": (Freezes("publish_plan", 1, before=False), 2),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_frozen_at_the_worst_moments(pictures, undisturbed, tmp_path, moment):
    """Who loses the plan ends with one line; who loses a unit goes on with what is left."""
    store = tmp_path / "store"
    freezes, code = MOMENTS[moment]
    frozen = start(Slow(pictures), store, prepare=freezes, lease_seconds=1)
    wait_for(lambda: psutil.Process(frozen.pid).status() == psutil.STATUS_STOPPED, frozen)
    other = start(Slow(pictures), store, lease_seconds=1)
    other.join(100)
    assert other.exitcode == 0
    require_whole(store, undisturbed)
    os.kill(frozen.pid, signal.SIGCONT)
    frozen.join(100)
    assert frozen.exitcode == code
    require_whole(store, undisturbed)


def test_who_wakes_does_not_take_files_from_who_is_writing_them(pictures, undisturbed, tmp_path):
    """Both have written the files of a unit, which have the same names; neither has its record yet."""
    store = tmp_path / "store"
    frozen = start(Slow(pictures), store, prepare=Freezes("write_unit", 3, before=False), lease_seconds=100)
    wait_for(lambda: psutil.Process(frozen.pid).status() == psutil.STATUS_STOPPED, frozen)
    time.sleep(1.5)  # to the other one its leases are over then; it will wait for those of the other one
    other = start(Slow(pictures), store, prepare=Freezes("publish_unit", 1, before=True), lease_seconds=1)
    wait_for(lambda: psutil.Process(other.pid).status() == psutil.STATUS_STOPPED, other)
    assert owner_of(store, 2) == other.pid
    os.kill(frozen.pid, signal.SIGCONT)
    wait_for(lambda: committed(store) >= 15, frozen)  # all but what the other one holds
    os.kill(other.pid, signal.SIGCONT)
    for process in (frozen, other):
        process.join(100)
        assert process.exitcode == 0
    require_whole(store, undisturbed)


def test_an_image_edited_while_one_process_works_and_another_joins(pictures, tmp_path):
    store = tmp_path / "store"
    first = start(pictures, store, prepare=Freezes("write_unit", 8, before=True), lease_seconds=100)
    wait_for(lambda: psutil.Process(first.pid).status() == psutil.STATUS_STOPPED, first)
    plan = Plan(store / "plan")
    for key in [plan.images(unit)[1].key for unit in (2, 7, 19)]:  # a committed unit, the one in work, one to come
        Image.new("RGB", (44, 44), "teal").save(pictures / key)
    second = start(pictures, store, lease_seconds=100)
    wait_for(lambda: (store / "plan" / "plan-0001.parquet").exists(), second)
    os.kill(first.pid, signal.SIGCONT)
    for process in (first, second):
        process.join(100)
        assert process.exitcode == 0
    encode_dataset(pictures, tiny_vae(), tmp_path / "anew", **SETTINGS)
    latents, anew = latents_of(store), latents_of(tmp_path / "anew")
    assert latents.keys() == anew.keys()
    assert all(torch.equal(latents[key]["mean"], anew[key]["mean"]) for key in anew)
    assert verify_store(store).is_whole
    assert encode_dataset(pictures, tiny_vae(), store, **SETTINGS).units_encoded == 0


def test_images_that_come_while_a_process_works_are_encoded_by_both(pictures, tmp_path):
    store = tmp_path / "store"
    first = start(pictures, store, prepare=Freezes("write_unit", 20, before=True), lease_seconds=100)
    wait_for(lambda: psutil.Process(first.pid).status() == psutil.STATUS_STOPPED, first)
    write_pictures(pictures, 30, first=COUNT)
    second = start(pictures, store, prepare=Freezes("write_unit", 1, before=True), lease_seconds=100)
    wait_for(lambda: psutil.Process(second.pid).status() == psutil.STATUS_STOPPED, second)
    os.kill(first.pid, signal.SIGCONT)  # finds ten new units, but for those that the other has taken
    wait_for(lambda: committed(store) >= 26, first)
    os.kill(second.pid, signal.SIGCONT)
    for process in (first, second):
        process.join(100)
        assert process.exitcode == 0
    assert len(rows_of(store)) == COUNT + 30 and verify_store(store).is_whole
    assert encode_dataset(pictures, tiny_vae(), store, **SETTINGS).units_encoded == 0
