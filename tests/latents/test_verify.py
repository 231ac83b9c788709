"""verify names what is wrong, and nothing where nothing is."""

import json
import os
import shutil

import pytest

from latentvae.errors import UserError
from latentvae.latents.store import LatentStore
from latentvae.latents.verify import verify_store
from tests.latents.stores import tiny_vae


@pytest.fixture
def store(encode, tmp_path):
    encode()
    return LatentStore(tmp_path / "store")


def problems(store):
    return verify_store(store.folder).problems


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_whole_store_has_no_problem(store):
    report = verify_store(store.folder)
    assert report.is_whole and report.units == 4 and report.counts.ok == 12
    assert "whole; 4 units, 12 inputs: 12 with latents" in str(report)


def test_a_folder_that_is_no_store(tmp_path):
    with pytest.raises(UserError, match=r"is not a latent store: it has no manifest\.json"):
        verify_store(tmp_path)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_missing_file_is_named(store, which):
    path = store.paths("32x32", 2)[which]
    path.unlink()
    (problem,) = problems(store)[:1]
    assert ("unit 2: not encoded yet" if which == 2 else f"shards/32x32/{path.name}: missing") in problem


def test_extra_files_are_named(store):
    (store.folder / "notes.txt").write_text("")
    shutil.copy(store.paths("32x32", 0)[0], store.shards / "32x32" / "u000099.safetensors")
    (store.folder / ".x.tmp-1-2").write_text("")
    found = "\n".join(problems(store))
    assert "notes.txt: not a file of this store" in found
    assert "shards/32x32/u000099.safetensors: not a file of this store" in found
    assert ".x.tmp-1-2: left by an encode that was killed" in found


def test_a_truncated_shard_and_a_flipped_bit_in_an_index_are_named(store):
    shard, index, _ = store.paths("32x32", 1)
    os.truncate(shard, 300)
    assert "u000001.safetensors: 300 bytes" in problems(store)[0]
    _, index, _ = store.paths("32x32", 3)
    data = bytearray(index.read_bytes())
    data[len(data) // 2] ^= 1
    index.write_bytes(data)
    assert any("u000003.parquet" in problem for problem in problems(store))


@pytest.mark.parametrize("name", ["manifest.json", "plan/plan-0000.parquet", "shards/32x32/u000001.json"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_a_flipped_bit_is_found_in_the_files_that_describe_the_others(store, name, part):
    data = bytearray((store.folder / name).read_bytes())
    data[int(len(data) * part)] ^= 1
    (store.folder / name).write_bytes(data)
    try:
        assert any(name in problem for problem in problems(store))
    except UserError as error:
        assert "manifest.json" in str(error)  # without it there is no store to speak of


def test_exchanged_shards_are_named(store):
    one, other = (store.paths("32x32", unit)[0] for unit in (0, 1))
    keep = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(keep)
    found = problems(store)
    assert [problem for problem in found if "its header belongs to another store or unit" in problem] == found
    assert len(found) == 2


def test_a_shard_of_another_store_is_named_with_the_field(store, encode, tmp_path):
    encode("other", dtype="fp32", vae=tiny_vae(seed=1))
    for mine, theirs in zip(store.paths("32x32", 1), LatentStore(tmp_path / "other").paths("32x32", 1), strict=True):
        shutil.copy(theirs, mine)
    found = "\n".join(problems(store))
    assert "u000001.json: made with other settings: dtype is fp32 there and fp16 here" in found
    assert "made with other settings: the encoder" in found


def test_an_edited_manifest_and_record_are_named(store):
    rewrite(store.paths("32x32", 0)[2], counts={"inputs": 3, "ok": 2, "error": 1, "skipped": 0, "rescued": 0})
    found = "\n".join(problems(store))
    assert "u000000.parquet: its rows are not the counts of the commit record" in found
    assert "manifest.json: its totals are not the sums of the commit records" in found
    store.paths("32x32", 0)[2].write_text("{")
    assert "u000000.json is damaged" in problems(store)[0]
    rewrite(store.manifest_path, fingerprint="0" * 64)
    assert "manifest.json: its fingerprint does not belong to its fields" in problems(store)


def test_an_unknown_schema_is_refused(store):
    rewrite(store.manifest_path, schema_version=99)
    with pytest.raises(UserError, match="has schema 99; this version of latentvae reads 1"):
        verify_store(store.folder)
