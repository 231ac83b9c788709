"""The plan follows the source: what is new makes new units, what went away stays."""

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from latentvae.data.entries import EntryTable
from latentvae.errors import UserError
from latentvae.images import DecodePolicy
from latentvae.latents.encoding.growth import compare, plan_new_images, probe_sizes
from latentvae.latents.operating.verify import verify_store
from latentvae.latents.reading.dataset import LatentDataset
from latentvae.latents.store.buckets import bucket_rule
from latentvae.latents.store.files import LatentStore
from latentvae.latents.store.plan import PLAN, Plan, publish
from tests.latents.stores import contents, rows_of


def test_new_images_make_new_units_and_touch_no_old_file(encode, photographs, tmp_path):
    encode()
    before = contents(tmp_path / "store")
    for index in range(4):
        Image.new("RGB", (40, 40), (index, 0, 0)).save(photographs / f"new_{index}.png")
    report = encode()
    assert report.counts.ok == 16 and report.units_encoded == 2 and "4 images are new" in report.notes[0]
    after = contents(tmp_path / "store")
    assert [name for name in before if after[name] != before[name]] == ["manifest.json"]
    assert "plan/plan-0001.parquet" in after and len(LatentDataset(tmp_path / "store")) == 16
    assert verify_store(tmp_path / "store").is_whole


def test_images_that_went_away_keep_their_latents(encode, photographs):
    encode()
    (photographs / "class_1" / "image_01.png").unlink()
    report = encode()
    assert report.counts.ok == 12 and "1 planned images are no longer in" in report.notes[0]


def test_other_images_are_not_mixed_in(encode, tmp_path):
    encode()
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    Image.new("RGB", (40, 40)).save(folder / "x.png")
    with pytest.raises(UserError, match="none of its keys is in"):
        encode(source=folder)


def test_headers_tell_the_bucket_and_what_has_none_is_sorted_out_later(photographs, encode, tmp_path):
    """72x96 photographs, one upright, one that only claims to be an image."""
    Image.new("RGB", (72, 96)).save(photographs / "upright.png")
    (photographs / "claim.png").write_bytes(b"no image")
    report = encode(resolution=None, buckets="area=4096,step=16,max-ratio=2", small="upscale", unit_images=100)
    assert report.counts.ok == 13 and report.counts.error == 1
    plan = Plan(tmp_path / "store" / "plan")
    homes = {image.key: image.bucket for unit in plan.units for image in plan.images(unit.number)}
    assert homes["claim.png"] == "mixed" and homes["upright.png"] == "48x80"
    assert {home for key, home in homes.items() if key.startswith("class")} == {"80x48"}
    assert len(plan.units) == 3 and verify_store(tmp_path / "store").is_whole


def test_an_image_that_was_edited_and_broke_has_not_the_size_of_the_older_one(photographs, encode, tmp_path):
    rule = {"resolution": None, "buckets": "area=4096,step=16,max-ratio=2"}
    encode(**rule)
    broken = photographs / "class_1" / "image_01.png"
    broken.write_bytes(broken.read_bytes()[:10])
    for out in ("store", "fresh"):
        encode(out, **rule)
        row = rows_of(tmp_path / out)["class_1/image_01.png"]
        assert (row["status"], row["width"], row["height"]) == ("error", None, None)


def entries(keys, **columns):
    table = EntryTable.from_columns(keys, "x.tar", offset=list(range(len(keys))), num_bytes=[9] * len(keys), mtime_ns=1)
    for name, values in columns.items():
        table = EntryTable(table.table.set_column(table.table.schema.get_field_index(name), name, pa.array(values)))
    return table


def test_a_source_is_compared_by_key(tmp_path):
    assert len(compare(Plan(tmp_path), entries("abc")).new) == 3
    rows = [{"unit": 0, "row": i, "key": key, "uri": "x.tar", "offset": i, "bucket": "mixed", "size": 9, "mtime": 1}
            for i, key in enumerate("abcd")]  # fmt: skip
    publish(tmp_path, pa.Table.from_pylist(rows, schema=PLAN))
    plan = Plan(tmp_path)
    same = compare(plan, entries("abcd"))
    assert (len(same.new), len(same.moved), same.touched, same.num_common, same.num_gone) == (0, 0, {}, 4, 0)
    other = compare(plan, entries("xbca", num_bytes=[9, 9, 8, 9], offset=[0, 1, 2, 7]))
    assert other.new.keys == ["x"] and other.num_gone == 1
    assert [(row["key"], row["offset"], row["size"]) for row in other.moved.to_pylist()] == [("a", 7, 9), ("c", 2, 8)]
    assert {unit: [(row, entry.key) for row, entry in rows] for unit, rows in other.touched.items()} == {0: [(2, "c")]}


def test_archives_are_planned_in_their_order(encode, tmp_path):
    encode()
    manifest = LatentStore(tmp_path / "store").read_manifest()
    rule = bucket_rule("area=4096,step=16,max-ratio=2", 2, 2, "skip")
    table = plan_new_images(
        entries([f"{9 - i}" for i in range(10)]), manifest, rule, DecodePolicy(), first_unit=5, unit_images=4,
        is_sequential=True,
    )  # fmt: skip
    assert table["key"].to_pylist() == [f"{9 - i}" for i in range(10)]
    assert table["unit"].to_pylist() == [5, 5, 5, 5, 6, 6, 6, 6, 7, 7]
    assert set(table["bucket"].to_pylist()) == {"mixed"} and set(table["width"].to_pylist()) == {None}


def test_only_local_files_are_probed(photographs):
    path = photographs / "class_1" / "image_01.png"
    uris = [str(path), "https://nowhere/x.png", __file__]
    table = EntryTable.from_columns(["a", "b", "c"], uris, num_bytes=[1, 1, 1])
    assert np.array_equal(probe_sizes(table, DecodePolicy()), [[96, 72], [-1, -1], [-1, -1]])
