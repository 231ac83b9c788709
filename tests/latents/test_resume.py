"""Killed at any moment, a store continues to the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latentvae.errors import UserError
from latentvae.files import TEMPORARY_MARK
from latentvae.latents.lock import ExclusiveLock
from latentvae.latents.store import LatentStore
from latentvae.latents.verify import verify_store
from tests.latents.stores import committed, contents, encode_photographs

ROOT = Path(__file__).parents[2]


def start(source, out, *arguments, **options):
    command = [sys.executable, "-m", "tests.latents.stores", str(source), str(out), *arguments]
    return subprocess.Popen(command, cwd=ROOT, **options)


@pytest.fixture
def pictures(photographs):
    """24 images: 8 units of 3."""
    for path in list(photographs.rglob("*.*")):
        (path.parent / f"again_{path.name}").write_bytes(path.read_bytes())
    return photographs


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_killed_and_resumed_gives_the_bytes_of_an_undisturbed_run(pictures, tmp_path):
    encode_photographs(pictures, tmp_path / "undisturbed")
    store = tmp_path / "killed"
    before = {}
    for units in (1, 3, 5):
        process = start(pictures, store)
        while len(committed(store)) < units:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        after = committed(store)
        assert units <= len(after) < 8
        assert {name: after[name] for name in before} == before, "a committed shard was written again"
        assert (store / "encode.lock").exists()
        before = after
    report = encode_photographs(pictures, store)
    assert report.units_encoded == 8 - len(before) and report.counts.inputs == 24
    after = committed(store)
    assert {name: after[name] for name in before} == before
    assert contents(store) == contents(tmp_path / "undisturbed")
    assert verify_store(store).is_whole


def test_a_finished_store_is_left_alone(photographs, tmp_path):
    encode_photographs(photographs, tmp_path / "store")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*") if path.is_file()}
    report = encode_photographs(photographs, tmp_path / "store")
    assert report.units_encoded == report.images_encoded == 0 and report.counts.ok == 12
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("stage", ["manifest", "plan", "shard", "index"])
def test_a_crash_between_two_files_is_mended(photographs, tmp_path, stage):
    encode_photographs(photographs, tmp_path / "undisturbed")
    encode_photographs(photographs, tmp_path / "store")
    layout = LatentStore(tmp_path / "store")
    shard, index, record = layout.paths("32x32", 2)
    doomed = {
        "manifest": [path for path in layout.folder.rglob("*") if path.is_file() and path != layout.manifest_path],
        "plan": [path for path in layout.shards.rglob("*") if path.is_file()],
        "shard": [index, record],
        "index": [record],
    }[stage]
    for path in doomed:
        path.unlink()
    (shard.parent / ".u000002.parquet.tmp-1-abcd").write_text("half a file")
    encode_photographs(photographs, tmp_path / "store")
    assert contents(tmp_path / "store") == contents(tmp_path / "undisturbed")


def test_a_truncated_shard_is_encoded_again(photographs, tmp_path):
    encode_photographs(photographs, tmp_path / "store")
    before = contents(tmp_path / "store")
    shard = LatentStore(tmp_path / "store").paths("32x32", 1)[0]
    os.truncate(shard, 100)
    report = encode_photographs(photographs, tmp_path / "store")
    assert report.units_encoded == 1 and "unit 1 lacks a file or has a truncated one" in report.notes[0]
    assert contents(tmp_path / "store") == before


def test_another_batch_size_is_allowed_and_noted(photographs, tmp_path):
    encode_photographs(photographs, tmp_path / "store")
    LatentStore(tmp_path / "store").paths("32x32", 1)[2].unlink()
    report = encode_photographs(photographs, tmp_path / "store", batch_size=3)
    assert any("batch_size is 2 there and 3 here" in note for note in report.notes)


def test_one_writer_at_a_time(photographs, tmp_path):
    (tmp_path / "store").mkdir()
    with (
        ExclusiveLock(tmp_path / "store" / "encode.lock"),
        pytest.raises(UserError, match=f"is being written by process {os.getpid()} on "),
    ):
        encode_photographs(photographs, tmp_path / "store")
    encode_photographs(photographs, tmp_path / "store")


def test_a_lock_of_a_dead_process_or_of_a_recycled_number_is_taken_over(tmp_path):
    path = tmp_path / "encode.lock"
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    with ExclusiveLock(path) as lock:
        mine = dict(lock.owner)
    for change in ({"pid": child.pid}, {"started": mine["started"] - 1000}):
        path.write_text(json.dumps(mine | change | {"token": "other"}))
        with ExclusiveLock(path) as lock:
            assert lock.is_held()
        assert not path.exists()


def test_a_lock_of_another_host_or_an_unreadable_one_is_respected(tmp_path):
    path = tmp_path / "encode.lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": 0.0}))
    with pytest.raises(UserError, match=r"process 1 on elsewhere; .* delete encode\.lock"), ExclusiveLock(path):
        pass
    path.write_text("")
    with pytest.raises(UserError, match="an unknown host"), ExclusiveLock(path):
        pass


def test_a_takeover_that_was_killed_is_cleaned_up(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    with ExclusiveLock(tmp_path / "encode.lock") as lock:
        aside = tmp_path / "encode.lock.abcd"
        aside.write_text(json.dumps(lock.owner | {"pid": child.pid}))
    with ExclusiveLock(tmp_path / "encode.lock"):
        assert not aside.exists()


def test_without_hard_links_there_is_one_writer_too(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with ExclusiveLock(tmp_path / "encode.lock") as lock:
        assert lock.is_held()
        with pytest.raises(UserError, match="is being written by"), ExclusiveLock(tmp_path / "encode.lock"):
            pass
    assert not list(tmp_path.iterdir())


def test_who_lost_the_lock_does_not_commit(tmp_path):
    with ExclusiveLock(tmp_path / "encode.lock") as lock:
        lock.path.write_text("{}")
        with pytest.raises(UserError, match="stops without committing"):
            lock.require_held()


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_shard_that_was_killed_half_way_has_a_name_that_the_next_run_removes(tmp_path):
    script = (
        "import sys, torch\nfrom latentvae.latents.store import LatentStore\n"
        "tensors = {'mean': torch.zeros(100, 4, 256, 256)}\n"  # 100 MB: long enough to be met while it is written
        "LatentStore(sys.argv[1]).commit('32x32', 0, tensors, [], {}, '', {})"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT)
    while not (left := [path.name for path in tmp_path.rglob("*") if path.is_file()]):
        assert process.poll() is None
    process.kill()
    process.wait()
    assert all(TEMPORARY_MARK in name for name in left), left


@pytest.mark.skipif(os.name == "nt", reason="no resource limits")
@pytest.mark.parametrize(("limit", "state"), [(10_000, "0 of 4 units are committed"), (1000, ""), (10, "")])
def test_a_full_disk_is_one_line_and_the_store_continues(photographs, tmp_path, limit, state):
    """Every write beyond the limit fails: the disk is full for the shards, for the manifest, even for the lock."""

    def limited_files():
        import resource  # absent on Windows

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    script = (
        "import sys\nfrom latentvae.errors import UserError\nfrom tests.latents.stores import encode_photographs\n"
        "try:\n    encode_photographs(sys.argv[1], sys.argv[2], dtype='fp32')\n"
        "except UserError as error:\n    sys.exit(f'error: {error}')"
    )
    command = [sys.executable, "-c", script, str(photographs), str(tmp_path / "store")]
    done = subprocess.run(command, cwd=ROOT, preexec_fn=limited_files, capture_output=True, text=True)
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"error: cannot write to {tmp_path / 'store'}: ") and "File too large" in line
    assert state in line and "run the same command again" in line
    assert not list((tmp_path / "store").glob("*lock*"))
    encode_photographs(photographs, tmp_path / "undisturbed", dtype="fp32")
    encode_photographs(photographs, tmp_path / "store", dtype="fp32")
    assert contents(tmp_path / "store") == contents(tmp_path / "undisturbed")


def test_an_unwritable_output_is_one_line(photographs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        encode_photographs(photographs, tmp_path / "file" / "store")
