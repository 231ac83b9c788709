"""Units: what is in them does not depend on anything but the keys."""

import hashlib
import time

import pytest

from latentvae.data.sources import SourceEntry
from latentvae.errors import UserError
from latentvae.images import DecodePolicy
from latentvae.latents.plan import Plan, plan_images, publish, read_plan
from latentvae.latents.records import Bucket

BUCKET = Bucket(width=32, height=32, latent_width=4, latent_height=4)


def planned(keys, *, first_unit=0, unit_images=4, bytes_per_row=100):
    entries = [SourceEntry(key, f"memory#{key}", None, None) for key in keys]
    return plan_images(
        entries, first_unit=first_unit, unit_images=unit_images, bytes_per_row=bytes_per_row, bucket=BUCKET,
        policy=DecodePolicy(),
    )  # fmt: skip


def test_units_follow_the_hash_of_the_keys():
    keys = [f"{index}.png" for index in range(10)]
    images = planned(keys)
    assert [image.key for image in images] == sorted(keys, key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    assert [(image.unit, image.row) for image in images] == [(i // 4, i % 4) for i in range(10)]
    assert planned(reversed(keys)) == images


def test_a_unit_holds_at_most_a_gigabyte_of_latents():
    assert [image.unit for image in planned("abcde", unit_images=1024, bytes_per_row=400_000_000)] == [0, 0, 1, 1, 2]


def test_sizes_are_read_from_the_headers(photographs):
    path = photographs / "class_1" / "image_01.png"
    entry = SourceEntry("a.png", str(path), path.stat().st_size, 1)
    broken = SourceEntry("b.png", __file__, 10, 1)
    options = {"first_unit": 0, "unit_images": 9, "bytes_per_row": 1, "bucket": BUCKET, "policy": DecodePolicy()}
    sizes = {image.key: (image.width, image.height) for image in plan_images([entry, broken], **options)}
    assert sizes == {"a.png": (96, 72), "b.png": (None, None)}


def test_a_published_plan_reads_back_and_grows(tmp_path):
    old, new = planned("abcde"), planned("xyz", first_unit=2)
    assert publish(tmp_path, old).name == "plan-0000.parquet"
    assert publish(tmp_path, new).name == "plan-0001.parquet"
    plan = read_plan(tmp_path)
    assert [*plan.images()] == [*old, *new]
    assert [len(unit.images) for unit in plan.units] == [4, 1, 3] and plan.num_images == 8


def test_a_damaged_plan_is_refused(tmp_path):
    images = planned("abcde")
    for wrong in (images[1:], [*images, images[-1]], images[:2] + images[3:]):
        with pytest.raises(UserError, match="the plan is damaged at unit"):
            Plan(wrong)
    publish(tmp_path, images)
    (tmp_path / "plan-0000.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="cannot read the plan"):
        read_plan(tmp_path)


@pytest.mark.slow
def test_a_million_keys_take_less_than_a_minute(tmp_path):
    began = time.monotonic()
    publish(tmp_path, planned([f"folder/{index:07d}.jpg" for index in range(1_000_000)], unit_images=1024))
    assert read_plan(tmp_path).num_images == 1_000_000
    assert time.monotonic() - began < 60
