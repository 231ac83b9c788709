"""verify names what is wrong, and nothing where nothing is."""

import json
import os
import re
import shutil
from dataclasses import replace

import pytest

from latentvae.errors import UserError
from latentvae.latents.operating.statistics import store_statistics
from latentvae.latents.operating.verify import verify_store
from latentvae.latents.store.lease import Leases
from latentvae.latents.store.records import IndexRow
from tests.latents import written
from tests.latents.stores import contents
from tests.latents.written import rewrite_unit, write_store


@pytest.fixture
def made(tmp_path):
    return write_store(tmp_path / "store", hflip=True)


def problems(made, **options):
    return verify_store(made.folder, progress=False, **options).problems


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def record_of(made, unit):
    return next(made.folder.glob(f"shards/*/u{unit:06d}.json"))


def shards_of(made, unit):
    return sorted(made.folder.glob(f"shards/*/u{unit:06d}-*.safetensors"))


def index_of(made, unit):
    return next(made.folder.glob(f"shards/*/u{unit:06d}-*.parquet"))


@pytest.mark.parametrize("level", ["quick", "full"])
@pytest.mark.parametrize("kind", ["moments", "mean", "sample"])
def test_a_whole_store_has_no_problem(tmp_path, level, kind):
    made = write_store(tmp_path / "store", store=kind, dtype="bf16", hflip=kind == "mean")
    before = contents(made.folder)
    report = verify_store(made.folder, level=level, progress=False)
    assert report.problems == [] and report.is_whole and report.units == 4 and report.counts.ok == 17
    assert "whole; 4 units, 19 inputs: 17 with latents, 1 errors, 1 skipped" in str(report)
    assert contents(made.folder) == before


def test_a_folder_that_is_no_store(tmp_path):
    with pytest.raises(UserError, match=r"is not a latent store: it has no manifest\.json"):
        verify_store(tmp_path)
    with pytest.raises(UserError, match="level is 'slow': it must be quick or full"):
        verify_store(tmp_path, level="slow")
    with pytest.raises(UserError, match="deep is -1"):
        verify_store(tmp_path, deep=-1)


@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_in_any_file_is_found_and_named(made, bit):
    """At many places of every file: all of the small ones' structure, and within the numbers of the shards."""
    files = sorted(path for path in made.folder.rglob("*") if path.is_file())
    assert {path.suffix for path in files} == {".json", ".parquet", ".safetensors"} and len(files) == 16
    for path in files:
        name = path.relative_to(made.folder).as_posix()
        whole = path.read_bytes()
        for place in sorted({0, 1, 7, 8, len(whole) - 1, *(len(whole) * part // 9 for part in range(1, 9))}):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                found = problems(made, level="full")
            except UserError as error:
                assert name == "manifest.json"  # without it there is no store to speak of
                found = [str(error)]
            assert any(name in problem for problem in found), (name, place, found)
        path.write_bytes(whole)
    assert problems(made, level="full") == []


def test_quick_finds_a_flipped_bit_in_all_but_the_numbers_of_the_shards(made):
    for path in sorted(made.folder.rglob("*")):
        if not path.is_file() or path.name == "manifest.json":
            continue
        whole = path.read_bytes()
        place = 12 if path.suffix == ".safetensors" else len(whole) // 2  # in the header of a shard
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert any(path.relative_to(made.folder).as_posix() in problem for problem in problems(made))
        path.write_bytes(whole)
    shard = shards_of(made, 0)[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert problems(made) == [] and len(problems(made, level="full")) == 1


def test_a_missing_file_is_named(made):
    shards_of(made, 3)[1].unlink()
    assert problems(made) == [f"shards/32x32/{shards_of(made, 3)[1].name}: missing"]
    index = index_of(made, 1)
    index.unlink()
    assert f"shards/32x32/{index.name}: missing" in problems(made)
    record_of(made, 2).unlink()
    found = "\n".join(problems(made))
    assert "1 of 4 units are not encoded yet, the first is unit 2" in found
    assert "no commit record names it (latentvae gc removes it)" in found


def test_a_missing_or_additional_plan_file_is_named(made):
    plan = made.folder / "plan" / "plan-0000.parquet"
    shutil.copy(plan, plan.with_name("plan-0001.parquet"))
    assert problems(made) == ["plan/plan-0001.parquet: it is not the file that the manifest names"]
    plan.with_name("plan-0001.parquet").unlink()
    plan.unlink()
    assert problems(made)[0] == "plan/plan-0000.parquet: it is not the file that the manifest names"


def test_extra_files_are_named(made):
    (made.folder / "notes.txt").write_text("")
    shard = shards_of(made, 0)[0]
    shutil.copy(shard, shard.with_name("u000000-00000000.safetensors"))
    (made.folder / ".x.tmp-1-2").write_text("")
    assert problems(made) == [
        ".x.tmp-1-2: left by an encode that was killed (latentvae gc removes it)",
        "notes.txt: not a file of this store",
        "shards/32x32/u000000-00000000.safetensors: no commit record names it (latentvae gc removes it)",
    ]


def test_what_a_living_process_works_on_is_no_problem(made):
    leases = Leases(made.store.leases)
    lease = leases.claim("u000000")
    shard = shards_of(made, 0)[0]
    shutil.copy(shard, shard.with_name("u000000-00000000.safetensors"))
    (shard.parent / f".u000000.json.tmp-1-2-{lease.token}").write_text("")
    assert problems(made) == []
    leases.close()
    assert len(problems(made)) == 2


def test_a_unit_that_is_redone_is_whole_and_its_old_files_are_garbage(made):
    rewrite_unit(made, 2, {key: {n: t * 0.5 for n, t in made.tensors[key].items()} for key in made.units[2]})
    found = problems(made)
    assert [line for line in found if "no commit record names it" in line] == found[-2:]
    assert found[:-2] == ["manifest.json: its statistics are not those of the commit records"]


def test_a_truncated_shard_is_named(made):
    shard = shards_of(made, 1)[0]
    size = shard.stat().st_size
    os.truncate(shard, 300)
    assert problems(made) == [f"shards/32x32/{shard.name}: 300 bytes, {size} were committed"]


def test_exchanged_shards_are_named(made):
    one, other = (shards_of(made, unit)[0] for unit in (0, 1))
    keep = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(keep)
    assert len([line for line in problems(made) if "were committed" in line]) == 2


def test_a_unit_of_another_store_is_named_with_the_field(made, tmp_path):
    other = write_store(tmp_path / "other", dtype="fp16", hflip=True, fields={"encoder": "2" * 64})
    for path in [record_of(made, 1), *shards_of(made, 1), index_of(made, 1)]:
        path.unlink()
    for path in [record_of(other, 1), *shards_of(other, 1), index_of(other, 1)]:
        shutil.copy(path, made.folder / path.relative_to(other.folder))
    found = "\n".join(problems(made))
    assert "u000001.json: made with other settings: dtype is fp16 there and fp32 here" in found
    assert "made with other settings: the encoder" in found
    assert "its header belongs to another store, unit or bucket" in found


def test_records_that_exchanged_places_are_named(made):
    one, other = record_of(made, 0), record_of(made, 1)
    keep = one.read_text()
    one.write_text(other.read_text())
    other.write_text(keep)
    found = problems(made)
    assert "shards/32x32/u000000.json: it is the record of unit 1 in 32x32" in found
    assert "shards/32x32/u000001.json: it is the record of unit 0 in 32x32" in found


def test_edited_manifests_and_records_are_named(made):
    rewrite(record_of(made, 0), counts={"inputs": 5, "ok": 5, "error": 0, "skipped": 0, "rescued": 0})
    found = "\n".join(problems(made))
    assert "its rows are not the counts of the commit record" in found
    assert "u000000.json: its bytes are not those that were written" in found
    record = json.loads(record_of(made, 1).read_text())
    record_of(made, 1).write_text(json.dumps(record | {"index": "../../secret.parquet"}))
    assert any("u000001.json: it names the files" in line for line in problems(made))
    record_of(made, 0).write_text("{")
    assert any("u000000.json is damaged" in line for line in problems(made))
    rewrite(made.store.manifest_path, fingerprint="0" * 64)
    assert "manifest.json: its fingerprint does not belong to its fields" in problems(made)


def test_a_manifest_without_buckets_is_told(made):
    rewrite(made.store.manifest_path, buckets=[])
    with pytest.raises(UserError, match=r"manifest\.json is damaged: it names no buckets"):
        problems(made)


def test_a_manifest_whose_totals_are_wrong_is_named(made):
    manifest = made.manifest
    wrong = manifest.statistics.model_copy(update={"count": 1})
    totals = manifest.totals.model_copy(update={"ok": 16})
    made.store.write_manifest(manifest.model_copy(update={"totals": totals, "statistics": wrong}))
    assert problems(made) == [
        "manifest.json: its totals are not the sums of the commit records",
        "manifest.json: its statistics are not those of the commit records",
    ]


def test_a_record_with_other_numbers_of_channels_is_named(made):
    record = json.loads(record_of(made, 0).read_text())
    rewrite(record_of(made, 0), channels=record["channels"] | {"total": [1.0], "maximum": [1.0]})
    assert problems(made) == ["shards/32x32/u000000.json: its bytes are not those that were written"]
    with pytest.raises(UserError, match=r"commit record of unit 0 of .* is damaged: run latentvae verify"):
        store_statistics(made.folder)


def test_an_index_that_does_not_fit_its_shards_is_named(tmp_path, monkeypatch):
    """Written wrongly, with hashes that are right: the contents are looked at."""
    unit_content = written._unit_content

    def wrong(home, keys, *arguments):
        rows, content = unit_content(home, keys, *arguments)
        if keys[0] == "a":
            rows[0] = replace(rows[0], row=1)
        if keys[0] == "c":
            rows[1] = replace(rows[1], crop_left=900)
        if keys[0] == "e":
            rows[1] = IndexRow(key="f", row=-1, status="error", error="gone", source_hash="sha256:0")
        return rows, content

    monkeypatch.setattr(written, "_unit_content", wrong)
    units = [("32x32", ["a", "b"]), ("32x32", ["c", "d"]), ("32x32", ["e", "f"]), ("32x32", ["g", "h"])]
    made = write_store(tmp_path / "store", units=units)
    made.units[3].reverse()
    rewrite_unit(made, 3, {})
    found = "\n".join(problems(made))
    assert f"{index_of(made, 0).name}: its rows in 32x32 are not 0 to 1, once each" in found
    assert re.search(r"u000003-\w+\.parquet: its keys are not those of the plan, once each and in order", found)
    assert f"{index_of(made, 1).name}: the crop of d is not inside its scaled image" in found
    assert f"{shards_of(made, 2)[0].name}: mean is (2, 2, 16, 16) torch.float32, (1, 2, 16, 16) fp32" in found
    assert "u000002.json: its sums are over 512 latent positions, the index has 256" in found


def test_a_key_that_is_planned_twice_is_named(tmp_path):
    made = write_store(tmp_path / "store", units=[("32x32", ["a", "b"]), ("32x32", ["c", "a"])])
    assert problems(made) == ["plan: it has the key a more than once"]


def test_a_store_that_is_not_complete(tmp_path):
    made = write_store(tmp_path / "store", complete=False, leave_out=[1, 3])
    assert problems(made) == [
        "2 of 4 units are not encoded yet, the first is unit 1 (run encode again)",
        "manifest.json: the store is not complete (run encode again)",
    ]


def test_damaged_units_are_dropped_and_nothing_else(made, caplog):
    shard, index = shards_of(made, 3)[0], index_of(made, 1)
    for path in (shard, index):
        data = bytearray(path.read_bytes())
        data[-9] ^= 1
        path.write_bytes(data)
    record_of(made, 0).write_text("not json")
    before = contents(made.folder)
    report = verify_store(made.folder, level="full", drop_damaged=True, progress=False)
    assert report.damaged_units == report.dropped_units == [0, 1, 3]
    assert "3 units were dropped: run the same encode again" in str(report)
    assert "unit 3 is damaged: its commit record is removed" in caplog.text
    after = contents(made.folder)
    assert {name for name in before if before[name] != after.get(name)} == {
        "manifest.json",
        "shards/32x32/u000000.json",
        "shards/32x32/u000001.json",
        "shards/mixed/u000003.json",
    }
    manifest = made.store.read_manifest()
    assert not manifest.complete and manifest.totals is None
    assert any("3 of 4 units are not encoded yet" in line for line in problems(made))
    assert not any("its bytes" in line for line in problems(made, level="full"))


def test_nothing_is_dropped_where_the_plan_is_damaged_or_an_encode_is_at_it(made):
    shards_of(made, 0)[0].unlink()
    leases = Leases(made.store.leases)
    leases.claim("plan")
    with pytest.raises(UserError, match=r"is being opened or finished by process .*: nothing was dropped, try again"):
        verify_store(made.folder, drop_damaged=True)
    leases.close()
    os.truncate(made.folder / "plan" / "plan-0000.parquet", 100)
    with pytest.raises(UserError, match="nothing was dropped, for what names the units is damaged: plan/plan-0000"):
        verify_store(made.folder, drop_damaged=True)
    assert len(list(made.folder.glob("shards/*/*.json"))) == 4


def test_an_unknown_schema_is_refused(made):
    rewrite(made.store.manifest_path, schema_version=99)
    with pytest.raises(UserError, match="has schema 99; this version of latentvae reads 2"):
        verify_store(made.folder)
