"""Killed at any instant, a store continues to the same bytes; what changed in the source is redone, and only that."""

import hashlib
import os
import random
import shutil
import signal
import time
from functools import partial

import pytest
import torch
from PIL import Image

from latentvae.errors import UserError
from latentvae.files import TEMPORARY_MARK
from latentvae.latents.encoding import engine, resume
from latentvae.latents.encoding.encode import encode_dataset
from latentvae.latents.operating.verify import verify_store
from latentvae.latents.store.files import LatentStore
from tests.latents.stores import (
    SETTINGS,
    Slow,
    contents,
    copy_of,
    identities,
    latents_of,
    pack,
    records_of,
    rows_of,
    start,
    tiny_vae,
    write_pictures,
)

posix_only = pytest.mark.skipif(os.name == "nt", reason="no SIGKILL, no resource limits")
BUCKETS = {"resolution": None, "buckets": "area=1024,step=8,max-ratio=2"}


def encode(source, out, **options):
    return encode_dataset(source, tiny_vae(), out, **(SETTINGS | options))


def committed(store):
    return len(list(store.glob("shards/*/u*.json")))


def units_of(store):
    """Key -> unit."""
    reader = LatentStore(store)
    return {
        key: number
        for number, record in records_of(store).items()
        for key in reader.read_unit_index(record, ["key"])["key"].to_pylist()
    }


@pytest.fixture
def pictures(tmp_path):
    """20 images: 7 units of 3 or 2."""
    write_pictures(tmp_path / "pictures", 20)
    return tmp_path / "pictures"


@posix_only
def test_killed_after_some_units_and_resumed_gives_the_bytes_of_an_undisturbed_run(tmp_path):
    write_pictures(tmp_path / "pictures", 200)
    settings = {"unit_images": 10} | BUCKETS
    encode(tmp_path / "pictures", tmp_path / "undisturbed", **settings)
    store, before = tmp_path / "killed", {}
    for units in (1, 7, 13):
        process = start(tmp_path / "pictures", store, **settings)
        while committed(store) < units:
            assert process.is_alive(), "it ended before it was killed"
            time.sleep(0.001)
        process.kill()
        process.join()
        done = {name for record in records_of(store).values() for name in record.files}
        after = {name: identity for name, identity in identities(store).items() if name in done}
        assert units <= len(records_of(store)) < 20
        assert {name: after[name] for name in before} == before, "a committed file was written again"
        before = after
    done = len(records_of(store))
    report = encode(tmp_path / "pictures", store, **settings)
    assert report.units_encoded == report.units - done and report.counts.inputs == len(rows_of(store)) == 200
    after = identities(store)
    assert {name: after[name] for name in before} == before
    assert contents(store) == contents(tmp_path / "undisturbed")
    assert verify_store(store).is_whole


@posix_only
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_killed_at_20_random_moments_and_resumed_gives_the_bytes_of_an_undisturbed_run(tmp_path, kind):
    """2,000 images, some of them broken; a run that ends before 20 kills is followed by another one."""
    write_pictures(tmp_path / "pictures", 1990)
    for number in range(10):
        content = (tmp_path / "pictures" / "part_0" / "00000.jpg").read_bytes()[: 40 * number]
        (tmp_path / "pictures" / f"broken_{number}.jpg").write_bytes(content)
    source = tmp_path / "pictures"
    settings = {"unit_images": 20, "batch_size": 8, "num_workers": 1} | BUCKETS
    if kind == "tar":
        source, settings = tmp_path / "pictures.tar", settings | {"num_workers": 0}
        pack(tmp_path / "pictures", source)
    process = start(source, tmp_path / "undisturbed", **settings)
    began = time.monotonic()
    process.join()
    whole = time.monotonic() - began
    assert process.exitcode == 0
    expected = contents(tmp_path / "undisturbed")
    rows = rows_of(tmp_path / "undisturbed")
    assert len(rows) == 2000 and sum(row["status"] == "error" for row in rows.values()) == 10
    moments = random.Random(0)
    units, finished = [], 0  # done when it was killed
    store = tmp_path / "killed"
    while len(units) < 20 or store.exists():
        process, before = start(source, store, **settings), committed(store)
        dies_early = moments.random() < 0.2  # as it starts; the others live long enough to commit something
        while not dies_early and process.is_alive() and committed(store) == before:
            time.sleep(0.005)
        process.join(moments.uniform(0, whole / 20) if len(units) < 20 else None)
        if process.is_alive():
            process.kill()
            process.join()
            units.append(committed(store))
            continue
        assert process.exitcode == 0
        assert contents(store) == expected
        assert rows_of(store).keys() == rows.keys()
        shutil.rmtree(store)
        finished += 1
    print(f"{kind}: undisturbed {whole:.1f} s; {finished} runs with 20 kills, after {units} units")
    assert len(set(units)) >= 10 and finished >= 1


class DiesAt:
    """Ends the process, without any clean-up, instead of its n-th change to the file system."""

    def __init__(self, number, said):
        self.left, self.said = number, said

    def __call__(self):
        for name in ("link", "rename", "replace", "unlink", "rmdir", "mkdir", "fsync"):
            setattr(os, name, partial(self._counted, getattr(os, name)))

    def _counted(self, function, *arguments, **options):
        if self.left == 0:
            self.said.write_text(function.__name__)
            os._exit(9)
        self.left -= 1
        return function(*arguments, **options)


@posix_only
@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 9])
def test_a_crash_between_any_two_changes_to_the_disk_is_mended(tmp_path, step):
    write_pictures(tmp_path / "pictures", 5)
    settings = {"hflip": True} | BUCKETS
    encode(tmp_path / "pictures", tmp_path / "undisturbed", **settings)
    expected = contents(tmp_path / "undisturbed")
    said, crashes = tmp_path / "said", []
    for number in range(0, 1000, step):
        store = tmp_path / f"crash_{number}"
        process = start(tmp_path / "pictures", store, prepare=DiesAt(number, said), **settings)
        process.join()
        if process.exitcode == 0:
            break
        crashes.append(said.read_text())
        encode(tmp_path / "pictures", store, **settings)
        assert contents(store) == expected, f"after a crash before change {number}, a {crashes[-1]}"
        shutil.rmtree(store)
    else:
        raise AssertionError("it never came to an end")
    assert len(crashes) >= 50 // step
    if step == 1:
        assert {"link", "replace", "unlink", "fsync", "mkdir"} <= set(crashes)


def test_a_finished_store_is_left_alone(pictures, tmp_path):
    encode(pictures, tmp_path / "store")
    before, folders = identities(tmp_path / "store"), set((tmp_path / "store").rglob("*"))
    report = encode(pictures, tmp_path / "store")
    assert report.units_encoded == report.images_encoded == 0 and report.counts.ok == 20
    assert identities(tmp_path / "store") == before and set((tmp_path / "store").rglob("*")) == folders


@pytest.mark.parametrize("kept", ["manifest", "plan", "shards"])
def test_what_is_missing_after_a_crash_is_written_again(pictures, tmp_path, kept):
    encode(pictures, tmp_path / "undisturbed")
    store = LatentStore(copy_of(tmp_path / "undisturbed", "store"))
    doomed = {
        "manifest": [path for path in store.folder.rglob("*") if path.is_file() and path != store.manifest_path],
        "plan": [path for path in store.shards.rglob("*") if path.is_file()],
        "shards": list(store.shards.rglob("*.json")),
    }[kept]
    for path in doomed:
        path.unlink()
    encode(pictures, store.folder)
    assert contents(store.folder) == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("suffix", [".safetensors", ".parquet"])
@pytest.mark.parametrize("is_gone", [False, True])
def test_a_truncated_or_missing_file_is_made_again(pictures, tmp_path, suffix, is_gone):
    encode(pictures, tmp_path / "store")
    before, touched = contents(tmp_path / "store"), identities(tmp_path / "store")
    (name,) = [name for name in records_of(tmp_path / "store")[1].files if name.endswith(suffix)]
    if is_gone:
        (tmp_path / "store" / name).unlink()
    else:
        os.truncate(tmp_path / "store" / name, 100)
    report = encode(pictures, tmp_path / "store")
    assert report.units_encoded == 1 and "unit 1 lacks a file or has a truncated one" in report.notes[0]
    assert contents(tmp_path / "store") == before
    after = identities(tmp_path / "store")
    changed = {name for name in after if after[name] != touched[name]}
    assert changed <= {"manifest.json", "shards/32x32/u000001.json", *records_of(tmp_path / "store")[1].files}


def test_leftovers_are_removed(pictures, tmp_path):
    encode(pictures, tmp_path / "store")
    before = contents(tmp_path / "store")
    shards, leases = tmp_path / "store" / "shards" / "32x32", tmp_path / "store" / "leases"
    leases.mkdir()
    for path in (
        shards / f".u000002.safetensors{TEMPORARY_MARK}1-abcd-0123456789abcdef",
        tmp_path / "store" / f".manifest.json{TEMPORARY_MARK}1-abcd",
        tmp_path / "store" / "plan" / f".plan-0001.parquet{TEMPORARY_MARK}1-abcd",
        leases / f".u000002.lease{TEMPORARY_MARK}1-abcd-0123456789abcdef",
        shards / "u000002-01234567.safetensors",  # a generation that no record names
        shards / "u000999-01234567.parquet",
    ):
        path.write_text("left by a process that was killed")
    encode(pictures, tmp_path / "store")
    assert contents(tmp_path / "store") == before and not leases.exists()


def test_another_batch_size_is_allowed_and_noted(pictures, tmp_path):
    encode(pictures, tmp_path / "store")
    (tmp_path / "store" / "shards" / "32x32" / "u000001.json").unlink()
    report = encode(pictures, tmp_path / "store", batch_size=3)
    assert any("batch_size is 2 there and 3 here" in note for note in report.notes)
    assert report.units_encoded == 1


class Limited:
    """No file may become larger, as on a disk that is full."""

    def __init__(self, limit, said):
        self.limit, self.said = limit, said

    def __call__(self):
        import resource  # absent on Windows

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        os.dup2(os.open(self.said, os.O_WRONLY | os.O_CREAT), 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, self.limit))


@posix_only
@pytest.mark.parametrize("limit", [9_000, 6_000, 1_000, 10], ids=["shards", "plan", "manifest", "leases"])
def test_a_full_disk_is_one_line_and_the_store_continues(pictures, tmp_path, limit):
    store, said = tmp_path / "store", tmp_path / "said"
    encode(pictures, tmp_path / "undisturbed", dtype="fp32")
    sizes = [len(content) for content in contents(tmp_path / "undisturbed").values()]
    assert max(sizes) > 9_000 > 6_000 > min(sizes) > 1_000
    process = start(pictures, store, dtype="fp32", prepare=Limited(limit, said))
    process.join()
    assert process.exitcode == 2
    line = said.read_bytes()[-400:].decode().strip().splitlines()[-1]
    if limit > 400:
        assert line.startswith(f"error: cannot write to {store}: File too large; what is committed stays: mend that")
    encode(pictures, store, dtype="fp32")
    assert contents(store) == contents(tmp_path / "undisturbed")


def test_an_unwritable_output_is_one_line(pictures, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        encode(pictures, tmp_path / "file" / "store")


def test_an_edited_image_redoes_its_unit_only(pictures, tmp_path):
    encode(pictures, tmp_path / "store", **BUCKETS)
    store = tmp_path / "store"
    units, before, old_rows, old_latents = units_of(store), identities(store), rows_of(store), latents_of(store)
    key = "part_3/00010.jpg"
    Image.new("RGB", (40, 48), "teal").save(pictures / key)
    report = encode(pictures, store, **BUCKETS)
    assert report.units_encoded == 1 and "1 units whose images were edited" in report.notes[0]
    after, files = identities(store), {name for record in records_of(store).values() for name in record.files}
    stem = f"u{units[key]:06d}"
    assert {name for name in before if after.get(name) != before[name] and stem not in name} == {"manifest.json"}
    assert {name for name in after if name not in before and stem not in name} == {"plan/plan-0001.parquet"}
    assert {name for name in after if "-" in name and name.startswith("shards")} == files, "old files were left"
    rows, latents = rows_of(store), latents_of(store)
    assert rows[key]["source_hash"] == f"sha256:{hashlib.sha256((pictures / key).read_bytes()).hexdigest()}"
    assert {name: row for name, row in rows.items() if name != key} == {
        name: row for name, row in old_rows.items() if name != key
    }
    assert not torch.equal(latents[key]["mean"], old_latents[key]["mean"])
    encode(pictures, tmp_path / "anew", **BUCKETS)
    anew = latents_of(tmp_path / "anew")
    assert all(torch.equal(latents[name]["mean"], anew[name]["mean"]) for name in anew)
    assert verify_store(store).is_whole
    still = identities(store)
    assert encode(pictures, store, **BUCKETS).units_encoded == 0 and identities(store) == still


def test_an_edit_that_changes_the_bucket_stays_in_its_unit(pictures, tmp_path):
    store = tmp_path / "store"
    encode(pictures, store, **BUCKETS)
    units, rows = units_of(store), rows_of(store)
    key = next(key for key, row in rows.items() if row["width"] < row["height"])
    Image.new("RGB", (64, 40), "teal").save(pictures / key)
    report = encode(pictures, store, **BUCKETS)
    assert report.units_encoded == 1 and units_of(store) == units
    new = rows_of(store)
    assert new[key]["bucket"] != rows[key]["bucket"] and new[key]["status"] == "ok"
    record = records_of(store)[units[key]]
    assert set(record.shards) == {rows[key]["bucket"], new[key]["bucket"]}
    assert record.shards[new[key]["bucket"]].startswith(f"shards/{new[key]['bucket']}/")
    assert verify_store(store).is_whole
    (pictures / key).write_bytes(b"no longer an image")
    assert encode(pictures, store, **BUCKETS).counts.error == 1
    assert set(records_of(store)[units[key]].shards) == {rows[key]["bucket"]}
    assert verify_store(store).is_whole


def test_a_touched_image_is_compared_once_and_not_redone(pictures, tmp_path, monkeypatch):
    store = tmp_path / "store"
    encode(pictures, store)
    before = identities(store)
    for key in ("part_1/00001.jpg", "part_2/00009.jpg"):
        os.utime(pictures / key, ns=(1, 1))
    hashed = []
    real = resume.content_hash
    monkeypatch.setattr(resume, "content_hash", lambda content: (hashed.append(content), real(content))[1])
    assert encode(pictures, store).units_encoded == 0
    assert len(hashed) == 2
    after = identities(store)
    assert {name for name in before if after[name] != before[name]} == {"manifest.json"}
    assert after.keys() - before.keys() == {"plan/plan-0001.parquet"}
    assert encode(pictures, store).units_encoded == 0
    assert len(hashed) == 2 and identities(store) == after


def test_images_edited_while_they_are_encoded_are_right_in_the_end(pictures, tmp_path, monkeypatch):
    """One in the unit that is about to be committed: read before the edit. One in a unit to come: read after it."""
    store, keys = tmp_path / "store", []
    write = engine.write_unit

    def edit_and_write(*arguments, **options):
        if not keys:
            planned = {image.key: image.unit for unit in range(7) for image in opened[0].plan.images(unit)}
            done = arguments[2].unit
            keys.append(next(key for key, unit in planned.items() if unit == done))
            keys.append(next(key for key, unit in planned.items() if unit == 6))
            for key in keys:
                Image.new("RGB", (44, 44), "teal").save(pictures / key)
        return write(*arguments, **options)

    opened = []
    claim = engine.claim_units
    monkeypatch.setattr(engine, "claim_units", lambda store, numbers: (opened.append(store), claim(store, numbers))[1])
    monkeypatch.setattr(engine, "write_unit", edit_and_write)
    assert encode(pictures, store).counts.ok == 20
    hashes = {key: f"sha256:{hashlib.sha256((pictures / key).read_bytes()).hexdigest()}" for key in keys}
    rows = rows_of(store)
    assert [rows[key]["source_hash"] == hashes[key] for key in keys] == [False, True]
    report = encode(pictures, store)
    assert report.units_encoded == 1, "the image that was read after its edit needs nothing"
    rows = rows_of(store)
    assert all(rows[key]["source_hash"] == hashes[key] for key in keys)
    encode(pictures, tmp_path / "anew")
    latents, anew = latents_of(store), latents_of(tmp_path / "anew")
    assert all(torch.equal(latents[key]["mean"], anew[key]["mean"]) for key in anew)


def test_100_new_images_touch_no_old_file(pictures, tmp_path):
    store = tmp_path / "store"
    encode(pictures, store, **BUCKETS)
    before = identities(store)
    write_pictures(pictures, 100, first=1000)
    report = encode(pictures, store, **BUCKETS)
    assert report.counts.ok == 120 and "100 images are new" in report.notes[0]
    after = identities(store)
    assert {name for name in before if after[name] != before[name]} == {"manifest.json"}
    assert len(rows_of(store)) == 120 and verify_store(store).is_whole


def test_retry_errors_redoes_the_units_with_errors_only(pictures, tmp_path):
    """The file was unreadable for a while, as on a bad disk: size and time are as planned, and now it can be read."""
    store, key = tmp_path / "store", "part_4/00004.jpg"
    good, status = (pictures / key).read_bytes(), (pictures / key).stat()
    (pictures / key).write_bytes(bytes(len(good)))
    os.utime(pictures / key, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert encode(pictures, store).counts.error == 1
    unit, before = units_of(store)[key], identities(store)
    (pictures / key).write_bytes(good)
    os.utime(pictures / key, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert encode(pictures, store).counts.error == 1, "without being asked nothing is redone"
    report = encode(pictures, store, retry_errors=True)
    assert report.units_encoded == 1 and report.counts.ok == 20 and report.counts.error == 0
    after = identities(store)
    assert {name for name in before if after.get(name) != before[name] and f"u{unit:06d}" not in name} == {
        "manifest.json"
    }
    encode(pictures, tmp_path / "undisturbed")
    assert contents(store) == contents(tmp_path / "undisturbed")
    still = identities(store)
    assert encode(pictures, store, retry_errors=True).units_encoded == 0 and identities(store) == still


def test_an_edited_tar_redoes_the_units_whose_bytes_changed(pictures, tmp_path):
    """One member grows, so that all behind it move; those are found at their new places and not encoded again."""
    store, tar = tmp_path / "store", tmp_path / "pictures.tar"
    pack(pictures, tar)
    encode(tar, store, **BUCKETS)
    units, before, old = units_of(store), identities(store), latents_of(store)
    Image.effect_noise((60, 44), 80).convert("RGB").save(tmp_path / "edited.jpg", quality=100)
    edited = (tmp_path / "edited.jpg").read_bytes()
    pack(pictures, tar, {"part_2/00002.jpg": edited})
    key = "pictures.tar/part_2/00002.jpg"
    report = encode(tar, store, **BUCKETS)
    assert report.units_encoded == 1 and "1 units whose images were edited" in report.notes[0]
    after, rows, latents = identities(store), rows_of(store), latents_of(store)
    stem = f"u{units[key]:06d}"
    assert {name for name in before if after.get(name) != before[name] and stem not in name} == {"manifest.json"}
    assert rows[key]["source_hash"] == f"sha256:{hashlib.sha256(edited).hexdigest()}" and rows[key]["width"] == 60
    assert all(torch.equal(latents[name]["mean"], old[name]["mean"]) for name in old if name != key)
    assert verify_store(store).is_whole
    last = f"u{units['pictures.tar/part_6/00013.jpg']:06d}"
    next((store / "shards").glob(f"*/{last}.json")).unlink()  # one behind the edited member, read at its new place
    assert encode(tar, store, **BUCKETS).units_encoded == 1
    assert all(torch.equal(latents_of(store)[name]["mean"], latents[name]["mean"]) for name in latents)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_image_that_kills_the_process_that_reads_it_is_an_error_row(pictures, tmp_path, num_workers):
    deadly = ("part_0/00007.jpg", "part_5/00012.jpg")
    report = encode(Slow(pictures, deadly=deadly), tmp_path / "store", num_workers=num_workers, unit_images=8)
    assert (report.counts.ok, report.counts.error) == (18, 2)
    rows = rows_of(tmp_path / "store")
    assert len(rows) == 20
    for key, row in rows.items():
        assert row["status"] == ("error" if key in deadly else "ok")
    assert {rows[key]["error"] for key in deadly} == {
        "the process that decoded it died: a crash in a decoder, or out of memory"
    }
    encode(Slow(pictures), tmp_path / "clean", unit_images=8)
    latents, clean = latents_of(tmp_path / "store"), latents_of(tmp_path / "clean")
    assert all(torch.equal(latents[key]["mean"], clean[key]["mean"]) for key in latents)
    report = encode(Slow(pictures), tmp_path / "store", num_workers=num_workers, unit_images=8, retry_errors=True)
    assert report.counts.ok == 20 and contents(tmp_path / "store") == contents(tmp_path / "clean")
