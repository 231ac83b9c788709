"""verify --deep: rows encoded again from their images."""

import pytest
import torch
from PIL import Image

from latentvae.checkpoint import save_model
from latentvae.errors import UserError
from latentvae.latents.operating.deep import _choose
from latentvae.latents.operating.verify import verify_store
from latentvae.latents.store.files import LatentStore, UnitContent, open_shard, write_unit
from latentvae.latents.store.plan import Plan
from latentvae.latents.store.records import IndexRow
from tests.latents.stores import contents, tiny_vae


@pytest.fixture
def deep(tmp_path, vae):
    def run(number=5, **options):
        return verify_store(tmp_path / "store", deep=number, progress=False, **({"vae": vae} | options))

    return run


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"store": "sample", "seed": 3, "dtype": "fp32"},
        {"hflip": True, "dtype": "bf16", "precision": "bf16"},
        {"resolution": None, "buckets": "area=2304,step=16,max-ratio=3", "store": "mean"},
    ],
    ids=["moments", "sample", "hflip", "buckets"],
)
def test_a_good_store_is_encoded_again_bit_for_bit(encode, deep, options):
    encode(**options)
    report = deep()
    assert report.problems == [] and report.deep is not None
    assert report.deep.num_rows == report.deep.identical == 5
    assert report.deep.max_difference == report.deep.rms_difference == 0 < report.deep.rounding
    assert "deep: 5 rows encoded again, 5 identical, 0 problems" in str(report)
    assert deep(100).deep.num_rows == 12  # all there are


def test_the_rows_are_spread_over_units_and_buckets_and_the_same_each_time(encode, tmp_path):
    encode(resolution=None, buckets="area=2304,step=16,max-ratio=3", unit_images=2)
    layout, records = _records(tmp_path)
    fingerprint = layout.read_manifest().fingerprint
    first, again = (_choose(layout, records, 4, fingerprint) for _ in "ab")
    assert first == again
    assert len({one.record.unit for one in first}) == 4
    everything = _choose(layout, records, 99, fingerprint)
    assert len({one.row.key for one in everything}) == len(everything) == 12
    assert {one.row.bucket for one in everything} == {bucket for record in records for bucket in record.shards}
    assert len({one.row.bucket for one in first}) == min(4, len({one.row.bucket for one in everything}))


def test_other_arithmetic_is_within_tolerance_and_told(encode, deep, tmp_path, vae, monkeypatch):
    """Float32 sums in another order: noise of 1e-6 in the moments."""
    encode(dtype="fp32")
    moments = type(vae).moments

    def noisy(self, images):
        return moments(self, images) * (1 + 1e-6 * torch.randn(1, generator=torch.Generator().manual_seed(0)))

    monkeypatch.setattr(type(vae), "moments", noisy)
    report = deep()
    assert report.is_whole and report.deep.identical == 0 and 0 < report.deep.max_difference < 1e-4


def test_exchanged_latents_are_found(encode, deep, tmp_path):
    """A store whose every hash is right, and whose rows are those of other images."""
    encode(unit_images=12)
    layout, (record,) = _records(tmp_path)
    (bucket,) = record.shards
    rows = [IndexRow(**row) for row in layout.read_unit_index(record).to_pylist()]
    tensors = {n: t.roll(1, 0).clone() for n, t in open_shard(layout.folder / record.shards[bucket]).tensors.items()}
    layout.record_path(record.bucket, 0).unlink()
    for name in record.files:
        (layout.folder / name).unlink()
    content = UnitContent(0, record.bucket, {bucket: tensors}, rows)
    assert write_unit(layout, layout.read_manifest(), content, record.environment, owner="test").publish()
    assert not [line for line in verify_store(tmp_path / "store", level="full").problems if "statistics" not in line]
    report = deep(3)
    assert report.damaged_units == [0]
    found = [line for line in report.problems if "encoded again, its mean differs by" in line]
    assert len(found) == 3 and all(line.startswith(f"shards/{bucket}/u000000-") for line in found)


def test_images_that_were_edited_or_are_gone_are_named(encode, deep, photographs):
    encode(unit_images=12)
    edited, gone = photographs / "class_0" / "image_00.jpg", photographs / "class_1" / "image_01.png"
    Image.open(edited).rotate(90).save(edited)
    gone.unlink()
    report = deep(12, drop_damaged=True)
    found = "\n".join(report.problems)
    assert "class_0/image_00.jpg: the image was edited since it was encoded (run encode again)" in found
    assert "class_1/image_01.png: it cannot be read any more" in found
    assert report.deep.num_rows == 10
    assert report.damaged_units == report.dropped_units == []  # the latents are good, and may be all that is left


def test_source_and_model_are_those_that_the_store_names_or_are_given(encode, deep, photographs, tmp_path, vae):
    save_model(vae, tmp_path / "model")
    encode(vae=str(tmp_path / "model"))
    assert deep(2, vae=None).deep.num_rows == 2
    before = contents(tmp_path / "store")
    moved = photographs.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"was made from .*photographs: .*; pass --source"):
        deep(2)
    with pytest.raises(UserError, match=r"the encoder .* pass the VAE that made it"):
        deep(2, vae=tiny_vae(seed=1), source=moved)
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(UserError, match=r"does not load here: .*; pass --vae"):
        deep(2, vae=None, source=moved)
    assert contents(tmp_path / "store") == before


def _records(tmp_path):
    layout = LatentStore(tmp_path / "store")
    units = Plan(layout.plan_folder).units
    return layout, [layout.read_record(unit.bucket, unit.number) for unit in units]
