"""Units: what is in them does not depend on anything but the keys."""

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentvae.data.entries import EntryTable
from latentvae.errors import UserError
from latentvae.latents.store import plan as plan_module
from latentvae.latents.store.plan import PLAN, Plan, cut_units, hash_order, publish


def rows(keys, *, first_unit=0, per_unit=4, bucket="32x32", **columns):
    """Rows of PLAN for keys in their order."""
    return pa.Table.from_pylist(
        [
            {"unit": first_unit + index // per_unit, "row": index % per_unit, "key": key, "uri": f"memory#{key}"}
            | {"bucket": bucket}
            | columns
            for index, key in enumerate(keys)
        ],
        schema=PLAN,
    )


def keys_of(plan, unit):
    return [image.key for image in plan.images(unit)]


def test_a_folder_is_ordered_by_the_hash_of_the_keys():
    keys = [f"{index}.png" for index in range(10)]
    table = EntryTable.from_columns(keys, [f"/x/{key}" for key in keys])
    ordered = [keys[index] for index in hash_order(table)]
    assert ordered == sorted(keys, key=lambda key: hashlib.sha256(key.encode()).hexdigest())


def test_images_of_one_home_are_gathered_in_their_order():
    homes = np.array(["a", "b", "a", "a", "b"])
    order, unit, row = cut_units(homes, {"a": 2, "b": 5}, 7, sequential=False)
    assert order.tolist() == [0, 2, 3, 1, 4]
    assert unit.tolist() == [7, 7, 8, 9, 9] and row.tolist() == [0, 1, 0, 0, 1]


def test_a_sequence_keeps_its_order_and_cuts_where_the_home_changes():
    homes = np.array(["a", "b", "a", "a", "a"])
    order, unit, row = cut_units(homes, {"a": 2, "b": 5}, 0, sequential=True)
    assert order.tolist() == [0, 1, 2, 3, 4]
    assert unit.tolist() == [0, 1, 2, 2, 3] and row.tolist() == [0, 0, 0, 1, 0]


def test_nothing_to_cut():
    assert [part.tolist() for part in cut_units(np.array([], "U1"), {}, 0, sequential=True)] == [[], [], []]


def test_a_published_plan_reads_back_and_grows(tmp_path):
    assert publish(tmp_path, rows("abcde")).name == "plan-0000.parquet"
    plan = Plan(tmp_path)
    assert publish(tmp_path, rows("xyz", first_unit=2, bucket="64x32")).name == "plan-0001.parquet"
    assert plan.num_images == 5 and plan.refresh() == set() and plan.num_images == 8
    assert [(unit.number, unit.bucket, unit.num_images) for unit in plan.units] == [
        (0, "32x32", 4), (1, "32x32", 1), (2, "64x32", 3),
    ]  # fmt: skip
    assert [keys_of(plan, unit) for unit in range(3)] == [list("abcd"), ["e"], list("xyz")]
    assert plan.columns(["key"])["key"].to_pylist() == list("abcdexyz")
    assert plan.images(1)[0].entry.uri == "memory#e"


def test_row_groups_end_between_units_and_any_unit_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_module, "GROUP_ROWS", 10)
    keys = [f"{index:03d}" for index in range(50)]
    path = publish(tmp_path, rows(keys))
    file = pq.ParquetFile(path)
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    assert max(sizes) <= 10 and all(size % 4 == 0 for size in sizes[:-1]) and len(sizes) > 4
    plan = Plan(tmp_path)
    for unit in (12, 0, 7, 3, 11):
        assert keys_of(plan, unit) == keys[4 * unit : 4 * unit + 4]


def test_newer_rows_take_the_place_of_older_ones(tmp_path):
    publish(tmp_path, rows("abcdefg"))
    plan = Plan(tmp_path)
    newer = pa.Table.from_pylist(
        [
            {"unit": 0, "row": 2, "key": "c", "uri": "moved#c", "bucket": "32x32", "size": 5},
            {"unit": 1, "row": 0, "key": "e", "uri": "moved#e", "bucket": "32x32", "size": 6},
        ],
        schema=PLAN,
    )
    publish(tmp_path, newer)
    assert plan.refresh() == {0, 1} and plan.num_images == 7
    for state in (plan, Plan(tmp_path)):
        uris = [image.uri for unit in (0, 1) for image in state.images(unit)]
        assert uris == ["memory#a", "memory#b", "moved#c", "memory#d", "moved#e", "memory#f", "memory#g"]
        assert state.columns(["uri", "size"]).to_pylist()[2] == {"uri": "moved#c", "size": 5}
        assert state.columns(["key"])["key"].to_pylist() == list("abcdefg")
    publish(tmp_path, newer.set_column(0, PLAN.field("unit"), pa.array([1, 9], pa.int32())))
    with pytest.raises(UserError, match="it amends unit 9, row 0"):
        Plan(tmp_path)


def test_a_damaged_plan_is_refused(tmp_path):
    whole = rows("abcde")
    wrong = {"first": whole.slice(1), "twice": pa.concat_tables([whole, whole.slice(4)]), "gap": whole.take([0, 1, 3])}
    for name, table in wrong.items():
        publish(tmp_path / name, table)
        with pytest.raises(UserError, match=r"plan-0000.parquet is damaged: its units or rows are not"):
            Plan(tmp_path / name)
    publish(tmp_path / "cut", whole)
    (tmp_path / "cut" / "plan-0000.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="cannot read the plan"):
        Plan(tmp_path / "cut")
    pq.write_table(pa.table({"unit": [0]}), tmp_path / "cut" / "plan-0000.parquet")
    with pytest.raises(UserError, match="does not have the columns of schema"):
        Plan(tmp_path / "cut")


def test_plans_beyond_four_digits_stay_in_order(tmp_path):
    for number in (9999, 10000, 10001):
        (tmp_path / f"plan-{number:04d}.parquet").touch()
    assert [path.stem for path in plan_module.plan_files(tmp_path)] == ["plan-9999", "plan-10000", "plan-10001"]
