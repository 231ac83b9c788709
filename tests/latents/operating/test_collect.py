"""Garbage collection removes what nobody needs, and nothing else."""

import os
import shutil
import subprocess
import sys
import time

import pytest

from latentvae.errors import UserError
from latentvae.latents.operating.collect import collect_garbage
from latentvae.latents.operating.verify import verify_store
from latentvae.latents.store.lease import Leases
from tests.latents.stores import contents
from tests.latents.written import rewrite_unit, write_store

DEAD = """
import sys
from pathlib import Path
from latentvae.latents.store.lease import Leases
lease = Leases(Path(sys.argv[1])).claim(sys.argv[2])
print(lease.token, flush=True)
"""


@pytest.fixture
def made(tmp_path):
    return write_store(tmp_path / "store", units=[("32x32", ["a", "b"]), ("32x32", ["c", "d"])])


def dead_lease(made, name):
    """The token of a lease whose owner is gone without releasing it."""
    command = [sys.executable, "-c", DEAD, made.store.leases, name]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def redo(made, unit):
    halves = {key: {n: t * 0.5 for n, t in made.tensors[key].items()} for key in made.units[unit]}
    rewrite_unit(made, unit, halves)


def test_a_clean_store_has_no_garbage(made):
    before = contents(made.folder)
    report = collect_garbage(made.folder)
    assert report.files == [] and report.notes == [] and "0 files removed, 0 bytes" in str(report)
    assert contents(made.folder) == before


def test_old_files_of_a_unit_that_was_redone_go_and_the_new_ones_stay(made):
    before = contents(made.folder)
    redo(made, 1)
    after = contents(made.folder)
    old = sorted(name for name in before if name not in after or "u000001-" in name)
    dry = collect_garbage(made.folder, dry_run=True)
    assert [file.path for file in dry.files] == old and contents(made.folder) == after
    assert "would be removed" in str(dry)
    report = collect_garbage(made.folder)
    assert report.files == dry.files and len(old) == 2
    assert report.num_bytes == sum(len(before[name]) for name in old)
    assert contents(made.folder) == {name: data for name, data in after.items() if name not in old}
    assert f"{old[0]}: {len(before[old[0]])} bytes, no record names it" in str(report)


def test_leftovers_of_a_killed_process_go(made):
    token = dead_lease(made, "u000001")
    folder = made.folder / "shards" / "32x32"
    leftovers = [
        folder / f".u000001.safetensors.tmp-77-abcd-{token}",
        folder / f"..u000001.json.tmp-77-abcd-{token}.tmp-77-ef01",
        folder / "u000001-00000000.safetensors",
        made.folder / ".manifest.json.tmp-77-abcd",
        made.folder / "plan" / ".plan-0001.parquet.tmp-77-abcd",
    ]
    whole = {name: data for name, data in contents(made.folder).items() if not name.startswith("leases")}
    for path in leftovers:
        path.write_bytes(b"12345")
    dry = collect_garbage(made.folder, dry_run=True)
    report = collect_garbage(made.folder)
    assert {file.path for file in report.files} == {file.path for file in dry.files}
    assert {file.path for file in report.files} == {
        *(path.relative_to(made.folder).as_posix() for path in leftovers),
        "leases/u000001.lease",
    }
    assert contents(made.folder) == whole and not made.store.leases.exists()
    assert verify_store(made.folder).is_whole


def test_what_a_living_process_works_on_stays(made):
    leases = Leases(made.store.leases)
    try:
        unit, plan = leases.claim("u000001"), leases.claim("plan")
        folder = made.folder / "shards" / "32x32"
        kept = [
            folder / f".u000001.safetensors.tmp-77-abcd-{unit.token}",
            folder / "u000001-00000000.safetensors",
            made.folder / ".manifest.json.tmp-77-abcd",
        ]
        gone = folder / "u000000-00000000.parquet"
        for path in [*kept, gone]:
            path.write_bytes(b"1")
        for dry_run in (True, False):
            report = collect_garbage(made.folder, dry_run=dry_run)
            assert [file.path for file in report.files] == ["shards/32x32/u000000-00000000.parquet"]
            assert "unit 1 is being encoded: 1 files are left alone" in str(report)
            assert "an encode is running" in str(report)
        assert all(path.exists() for path in kept) and not gone.exists()
        assert unit.is_held() and plan.is_held()
    finally:
        leases.close()


def test_what_is_committed_while_it_looks_stays(made, monkeypatch):
    """The worst moment: between looking and removing, another process commits the same content again."""
    from latentvae.latents.operating import collect

    record = next(made.folder.glob("shards/*/u000001.json"))
    data = record.read_bytes()
    record.unlink()
    unnamed = collect.unnamed_files

    def slow(*arguments):
        found = unnamed(*arguments)
        record.write_bytes(data)
        return found

    monkeypatch.setattr(collect, "unnamed_files", slow)
    assert collect_garbage(made.folder).files == []
    assert verify_store(made.folder, level="full", progress=False).is_whole


def test_foreign_files_stay(made):
    for name in ("notes.txt", "shards/32x32/u000001.safetensors", "shards/32x32/mine-00000000.parquet"):
        (made.folder / name).write_text("mine")
    before = contents(made.folder)
    assert collect_garbage(made.folder).files == [] and contents(made.folder) == before


def test_mistakes(made, tmp_path):
    with pytest.raises(UserError, match="is not a latent store"):
        collect_garbage(tmp_path)
    record = next(made.folder.glob("shards/*/u000001.json"))
    record.write_text("{")
    before = contents(made.folder)
    with pytest.raises(UserError, match=r"commit record .*u000001\.json is damaged"):
        collect_garbage(made.folder)
    assert contents(made.folder) == before


def test_a_lease_that_nobody_touched_is_over(made):
    leases = Leases(made.store.leases)
    lease = leases.claim("u000001")
    text = lease.path.read_text().replace(str(os.getpid()), "1").replace("host", "other")
    leases.close()
    made.store.leases.mkdir()
    lease.path.write_text(text)
    assert collect_garbage(made.folder, dry_run=True).files == []
    long_ago = time.time() - 4000
    os.utime(lease.path, (long_ago, long_ago))
    assert [file.path for file in collect_garbage(made.folder, dry_run=True).files] == ["leases/u000001.lease"]
    assert [file.path for file in collect_garbage(made.folder).files] == ["leases/u000001.lease"]
    shutil.rmtree(made.store.leases, ignore_errors=True)
