"""Captions and labels by key, from every kind of source; what is edited is seen by captions opened later."""

import json
import os
import pickle

import numpy as np
import pyarrow as pa
import pytest

from latentvae.data import FolderSource, PythonSource, open_source
from latentvae.data.caption_tables import KeyIndex
from latentvae.data.captions import open_captions
from latentvae.data.parquet import ParquetSource
from latentvae.errors import UserError
from tests.data.archives import png, write_parquet, write_tar


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_text_beside_the_image(tmp_path):
    write(tmp_path, a_dot_png=png(), a_dot_txt=" a house \n", d__b_dot_png=png(), d__c_dot_png=png(), d__c_dot_txt="é")
    captions = open_captions(tmp_path)
    assert captions.get(["d/c.png", "a.png", "d/b.png", "absent.png"]) == [
        {"caption": "é"},
        {"caption": "a house"},
        {},
        {},
    ]
    write(tmp_path, a_dot_txt="a tree")
    assert open_captions(FolderSource(tmp_path)).get(["a.png"]) == [{"caption": "a tree"}]
    write(tmp_path, a_dot_txt=b"\xff\xfe\xfa")
    with pytest.raises(UserError, match=r"a\.txt cannot be read as UTF-8"):
        captions.get(["a.png"])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"the caption .*a\.txt is a named pipe"):
        open_captions(FolderSource(tmp_path)).get(["a.png"])


def test_nesting_without_end_is_told(tmp_path):
    write_tar(tmp_path / "s.tar", {"a.png": png(), "a.json": b"[" * 100_000})
    with pytest.raises(UserError, match=r"s\.tar/a\.json cannot be read as JSON"):
        open_captions(tmp_path / "s.tar").get(["s.tar/a.png"])


def test_metadata_of_any_folder(tmp_path):
    write(tmp_path, a_dot_png=png(), d__b_dot_png=png(), d__e__c_dot_png=png(), x_dot_png=png())
    rows = [{"file_name": "a.png", "text": "top", "label": 3}, {"file_name": "d/b.png", "text": "from above"}]
    rows += [{"file_name": "d/e/c.png", "text": "far", "none": None}]
    write(tmp_path, metadata_dot_jsonl="\n".join(map(json.dumps, rows)))
    write(tmp_path, d__metadata_dot_csv="file_name,caption,score\nb.png,near,0.5\n")
    keys = ["a.png", "d/b.png", "d/e/c.png", "x.png"]
    expected = [{"caption": "top", "label": 3}, {"caption": "near", "score": "0.5"}, {"caption": "far"}, {}]
    assert open_captions(str(tmp_path)).get(keys) == expected
    write(tmp_path, d__b_dot_txt="nearest")  # the text beside the image wins, the other fields stay
    assert open_captions(tmp_path).get(["d/b.png"]) == [{"caption": "nearest", "score": "0.5"}]
    write(tmp_path, d__metadata_dot_csv="file_name,caption\nb.png,edited\n", d__b_dot_png=png(1))
    (tmp_path / "d" / "b.txt").unlink()
    assert open_captions(tmp_path).get(["d/b.png"]) == [{"caption": "edited"}]


def test_both_captions_stay_where_both_are_given(tmp_path):
    write(tmp_path, t_dot_jsonl='{"key": "a", "text": "t", "caption": "c"}\n{"key": "b", "text": ["not", "text"]}')
    assert open_captions(tmp_path / "t.jsonl").get(["a", "b"]) == [
        {"text": "t", "caption": "c"},
        {"text": ["not", "text"]},
    ]


def test_members_of_a_sample(tmp_path):
    members = {
        "x/1.txt": b"one",
        "x/1.png": png(1),
        "x/1.mask.png": png(2),
        "x/1.cls": b"7",
        "x/1.json": b'{"caption": "from json", "width": 8}',
        "y/1.cls": b"cat",
        "y/1.png": png(3),
        "2.png": png(4),
        "3.json": b"[1, 2]",
        "3.png": png(5),
    }
    write_tar(tmp_path / "s.tar", members)
    write_tar(tmp_path / "t.tar", {"2.png": png(), "2.txt": b"of another shard"})
    source = open_source(f"{tmp_path}/*.tar")
    captions = open_captions(source)
    first = {"caption": "one", "label": 7, "width": 8}
    by_key = {
        "s.tar/x/1.png": first,
        "s.tar/x/1.mask.png": first,
        "s.tar/y/1.png": {"label": "cat"},
        "s.tar/2.png": {},
        "s.tar/3.png": {"json": [1, 2]},
        "t.tar/2.png": {"caption": "of another shard"},
    }
    assert captions.get(source.entries().keys) == [by_key[key] for key in source.entries().keys]
    backwards = list(by_key)[::-1]
    assert captions.get(backwards) == [by_key[key] for key in backwards]
    assert captions.get(["s.tar/absent.png", "nothing"]) == [{}, {}]
    write_tar(tmp_path / "t.tar", {"2.png": png(), "2.txt": b"edited"})
    assert open_captions(f"{tmp_path}/*.tar").get(["t.tar/2.png"]) == [{"caption": "edited"}]
    write_tar(tmp_path / "t.tar", {"2.png": png(), "2.json": b"{"})
    with pytest.raises(UserError, match=r"t\.tar/2\.json cannot be read as JSON"):
        open_captions(tmp_path).get(["t.tar/2.png"])


def test_columns_of_parquet(tmp_path):
    images = [png(index) for index in range(5)]
    columns = {"text": [f"t{index}" for index in range(5)], "label": [0, 1, None, 3, 4]}
    write_parquet(tmp_path / "a.parquet", image=images, **columns)
    write_parquet(tmp_path / "b.parquet", image=images[:1], text=["last"], label=[9])
    keys = ["b.parquet/000000000", "a.parquet/000000004", "a.parquet/000000002", "a.parquet/000000005"]
    expected = [{"caption": "last", "label": 9}, {"caption": "t4", "label": 4}, {"caption": "t2"}, {}]
    for given in (tmp_path, f"{tmp_path}/*.parquet", open_source(tmp_path)):
        assert open_captions(given).get(keys) == expected
    path = write_parquet(tmp_path / "k.parquet", image=images[:2], name=["x", "y"], caption=["one", "two"])
    assert open_captions(path, key_column="name").get(["y", "x", "z"]) == [{"caption": "two"}, {"caption": "one"}, {}]
    source = ParquetSource([str(path)], key_column="name")
    assert open_captions(source).get(["y"]) == [{"caption": "two"}]
    table = write_parquet(tmp_path / "t.parquet", file_name=["d/a.png", "b.png"], caption=["A", "B"])
    assert open_captions(table).get(["b.png", "d/a.png"]) == [{"caption": "B"}, {"caption": "A"}]
    with pytest.raises(UserError, match="has no column key or __key__ or id or file_name of keys"):
        open_captions(write_parquet(tmp_path / "u.parquet", caption=["A"])).get(["a"])
    with pytest.raises(UserError, match="no column nothing of keys"):
        open_captions(path, key_column="nothing").get(["a"])


def test_columns_of_a_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    values = {
        "image": [{"bytes": png(index), "path": None} for index in range(3)],
        "text": list("abc"),
        "label": [2, 0, 1],
    }
    given = datasets.Dataset.from_dict(values).cast_column("image", datasets.Image())
    given.save_to_disk(tmp_path / "saved")
    captions = open_captions(tmp_path / "saved")
    expected = [{"caption": "c", "label": 1}, {}, {"caption": "a", "label": 2}]
    assert captions.get(["saved/000000002", "saved/000000003", "saved/000000000"]) == expected
    assert open_captions(given.remove_columns(["text", "label"])).get(["dataset/000000000"]) == [{}]
    both = datasets.DatasetDict({"x": given, "y": given.select([2])})
    assert open_captions(both, split="y").get(["y/000000000"]) == [{"caption": "c", "label": 1}]


def test_tables_and_lists(tmp_path):
    write(tmp_path, a_dot_png=png(), a_dot_txt="beside", b_dot_png=png(), l_dot_txt="a.png\nb.png\n")
    assert open_captions(open_source(tmp_path / "l.txt")).get(["a.png", "b.png"]) == [{"caption": "beside"}, {}]
    rows = '{"path": "a.png", "label": 1}\n{"path": "b.png", "key": "mine", "caption": "own"}\n'
    write(tmp_path, l_dot_jsonl=rows, t_dot_csv="key,caption\na.png,A\nmine,M\n")
    for given in (tmp_path / "l.jsonl", open_source(tmp_path / "l.jsonl")):
        keys = open_source(tmp_path / "l.jsonl").entries().keys
        assert keys == ["a.png", "mine"]
        assert open_captions(given).get(keys) == [{"label": 1, "caption": "beside"}, {"caption": "own"}]
    assert open_captions(tmp_path / "t.csv").get(["mine", "a.png", "b.png"]) == [{"caption": "M"}, {"caption": "A"}, {}]
    write(tmp_path, t_dot_csv="name,caption\na.png,A\n")
    with pytest.raises(UserError, match=r"t\.csv, line 2: a key is needed"):
        open_captions(tmp_path / "t.csv").get(["a.png"])
    with pytest.raises(UserError, match="does not exist"):
        open_captions(tmp_path / "absent.csv")


def test_mappings_and_python_items():
    captions = open_captions({"a": "one", "b": {"text": "two", "label": 2}, "c": 3})
    assert captions.get(["b", "x", "a"]) == [{"caption": "two", "label": 2}, {}, {"caption": "one"}]
    with pytest.raises(UserError, match="caption of 'c' is a int"):
        captions.get(["c"])
    items = [{"key": f"k{index}", "image": np.zeros((4, 4, 3), np.uint8), "text": f"t{index}"} for index in range(3)]
    for given in (items, PythonSource(items), iter(items)):
        assert open_captions(given).get(["k2", "k0", "k9"]) == [{"caption": "t2"}, {"caption": "t0"}, {}]


def test_a_source_whose_captions_nobody_knows():
    names = ("name", "is_sequential", "__len__", "entries", "fetch", "decode", "read")
    own = type("Stranger", (), {name: getattr(FolderSource, name, "own") for name in names})()
    with pytest.raises(UserError, match="Stranger, whose captions are not known"):
        open_captions(own)


def test_captions_can_be_sent_to_workers(tmp_path):
    write(tmp_path / "f", a_dot_png=png(), a_dot_txt="A")
    write_tar(tmp_path / "s.tar", {"a.png": png(), "a.txt": b"A"})
    write_parquet(tmp_path / "p.parquet", image=[png()], key=["a"], caption=["A"])
    for given, key in (("f", "a.png"), ("s.tar", "s.tar/a.png"), ("p.parquet", "a")):
        captions = open_captions(tmp_path / given)
        for copied in (pickle.loads(pickle.dumps(captions)), captions, pickle.loads(pickle.dumps(captions))):
            assert copied.get([key]) == [{"caption": "A"}]


def test_key_index_finds_all_of_them():
    keys = ["b", "a", "é", "b", "\U0001f600", "\uffff", ""]
    index = KeyIndex(pa.array(keys))
    for key in [*keys, "c", "z", "aa"]:
        assert index.find(key) == [place for place, other in enumerate(keys) if other == key]
    assert KeyIndex(pa.array([], pa.string())).find("a") == []
