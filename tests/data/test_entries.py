"""The table of entries, and keys that are safe to become file names."""

import pickle

import numpy as np
import pyarrow as pa
import pytest

from latentvae.data.entries import ENTRIES, EntryTable, SourceEntry, safe_key
from latentvae.errors import UserError

ROWS = [
    SourceEntry("b", "/x/s.tar", 512, 7, 10**18),
    SourceEntry("a/é.png", "/x/s.tar", 2048, 9, 10**18),
    SourceEntry("c", "https://host/c.png", None, None, None),
]


def test_entries_come_back_as_they_went_in():
    table = EntryTable.from_entries(iter(ROWS))
    assert table.table.schema == ENTRIES and len(table) == 3
    assert list(table) == ROWS and [table[index] for index in range(3)] == ROWS and table[-1] == ROWS[-1]
    assert list(table[1:]) == ROWS[1:] and list(table[::-1]) == ROWS[::-1]
    assert table.keys == ["b", "a/é.png", "c"]
    with pytest.raises(IndexError):
        table[3]
    copy = pickle.loads(pickle.dumps(table))
    assert copy == table and copy != table[:2] and table != ROWS


def test_columns_and_rows_give_the_same_table():
    rows = [SourceEntry(f"k{index}", "u", index, 5, 9) for index in range(4)]
    columns = EntryTable.from_columns([row.key for row in rows], "u", np.arange(4), [5] * 4, 9)
    assert columns == EntryTable.from_entries(rows)
    assert EntryTable.from_columns(["a"], ["u"]) == EntryTable.from_entries([SourceEntry("a", "u", None, None, None)])
    assert EntryTable.concatenated([columns[:1], columns[1:]]) == columns
    assert len(EntryTable.from_entries([])) == 0 == len(EntryTable.concatenated([]))
    with pytest.raises(TypeError, match="ENTRIES"):
        EntryTable(pa.table({"key": ["a"]}))


def test_order_and_duplicates():
    names = ["b", "a", "ä", "z", "A", "a/b", "\U0001f600", "\uffff"]
    table = EntryTable.from_columns(names, "u")
    assert table.sorted_by_key().keys == sorted(names) and table.duplicate() is None
    assert EntryTable.from_columns([*names, "z", "a"], "u").duplicate() == "a"
    assert EntryTable.from_columns([], "u").duplicate() is None
    assert EntryTable.from_columns(["x"], "u").duplicate() is None


def test_more_text_than_one_array_holds(monkeypatch):
    names = [f"{index * 7919 % 1000:04d}" for index in range(1000)]
    table = EntryTable.from_columns(names, "u", np.arange(1000))
    expected = table.sorted_by_key(), list(table[::3])
    monkeypatch.setattr("latentvae.data.entries._MAX_TEXT", 0)
    monkeypatch.setattr("latentvae.data.entries._CHUNK", 7)
    assert (table.sorted_by_key(), list(table[::3])) == expected and expected[0].keys == sorted(names)
    assert table.duplicate() is None
    assert EntryTable.from_columns([*names, "0500"], "u").duplicate() == "0500"


def test_a_million_entries_stay_small():
    table = EntryTable.from_columns([f"class_{i % 100}/image_{i:07d}.jpg" for i in range(100_000)], "/data/s.tar")
    assert table.table.nbytes < 100_000 * 100


def test_names_that_are_no_unicode_are_told():
    for build in (
        lambda name: EntryTable.from_columns([name], "u"),
        lambda name: EntryTable.from_columns(["a"], name),
        lambda name: EntryTable.from_entries([SourceEntry("a", name, None, None, None)]),
    ):
        with pytest.raises(UserError, match=r"\\udcff.*not valid Unicode: rename"):
            build("\udcff.png")


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("a/b.png", "a/b.png"),
        ("./a//b.png", "a/b.png"),
        ("/etc/a.png", "etc/a.png"),
        ("../../a.png", "a.png"),
        ("x/../../a.png", "a.png"),
        ("x/y/../a.png", "x/a.png"),
        ("C:\\pictures\\a.png", "pictures/a.png"),
        ("..", ""),
        ("..\\..\\a.png", "a.png"),
        ("a..b/...png", "a..b/...png"),
    ],
)
def test_keys_lead_out_of_no_folder(path, key):
    assert safe_key(path) == key
