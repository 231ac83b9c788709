"""A store read through: every shard once, rows beside their latents."""

import json

import pytest
import torch

from latentvae.errors import UserError
from latentvae.latents.operating.parts import stored_buckets, stored_keys, stored_parts
from latentvae.latents.reading.readable import ReadableStore
from tests.latents import written
from tests.latents.written import write_store


@pytest.mark.parametrize("bucket", [None, "32x32", "48x32", "16x24"])
def test_every_latent_comes_once_and_beside_its_row(tmp_path, bucket):
    made = write_store(tmp_path / "store", hflip=True, dtype="bf16")
    store = ReadableStore(made.folder)
    assert stored_buckets(store) == ["16x24", "32x32", "48x32"]
    parts = list(stored_parts(store, bucket))
    keys = [row.key for part in parts for row in part.rows]
    assert keys == stored_keys(store, bucket)
    assert sorted(keys) == sorted(key for key in made.keys if bucket in (None, made.rows[key].bucket))
    for part in parts:
        for place, row in enumerate(part.rows):
            assert row == made.rows[row.key] and row.bucket == part.bucket
            assert all(torch.equal(part.tensors[name][place], made.tensors[row.key][name]) for name in part.tensors)
            assert set(part.tensors) == {"mean", "logvar", "mean_hflip", "logvar_hflip"}


def test_a_shard_that_does_not_fit_its_index_is_refused(tmp_path, monkeypatch):
    unit_content = written._unit_content

    def one_row_less(*arguments):
        rows, content = unit_content(*arguments)
        return rows[:-1], content

    monkeypatch.setattr(written, "_unit_content", one_row_less)
    made = write_store(tmp_path / "store", units=[("32x32", ["a", "b"])])
    with pytest.raises(UserError, match=r"safetensors of .* does not fit its index: run latentvae verify"):
        list(stored_parts(ReadableStore(made.folder)))


def test_a_shard_without_what_the_manifest_says_is_refused(tmp_path):
    made = write_store(tmp_path / "store")
    manifest = json.loads(made.store.manifest_path.read_text())
    made.store.manifest_path.write_text(json.dumps(manifest | {"hflip": True}))
    with pytest.raises(UserError, match=r"does not hold what the manifest says: run latentvae verify"):
        list(stored_parts(ReadableStore(made.folder)))
