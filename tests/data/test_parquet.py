"""Parquet files with image bytes: columns found or named, rows by key, files that changed."""

import os
import pickle

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from latentvae.data import DataConfig, open_source, training_batches
from latentvae.data.parquet import ParquetSource
from latentvae.errors import UserError
from latentvae.images import ImageError, PixelFormat
from tests.data.archives import png, write_parquet

IMAGES = [png(index) for index in range(7)]
KEYS = [f"k{index}" for index in range(7)]


def test_rows_in_order_with_their_keys(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", image=IMAGES, key=KEYS, caption=["text"] * 7)
    source = open_source(path)
    assert isinstance(source, ParquetSource) and source.is_sequential and source.entries().keys == KEYS
    entry = source.entries()[3]
    assert (entry.uri, entry.offset, entry.num_bytes) == (str(path), 3, None)
    assert entry.mtime_ns == os.stat(path).st_mtime_ns
    assert source.fetch(source.entries()) == IMAGES
    assert source.fetch(list(source.entries())[::-1]) == IMAGES[::-1]
    assert [int(source.read(index)[0, 0, 0]) for index in (6, 0, 3)] == [6, 0, 3]
    copy = pickle.loads(pickle.dumps(source))
    assert copy.entries() == source.entries() and copy.fetch(list(source.entries())) == IMAGES
    assert ParquetSource([str(path)]).fetch(list(source.entries())) == IMAGES  # without listing


def test_without_a_key_the_row_is_the_key(tmp_path):
    write_parquet(tmp_path / "b.parquet", image=IMAGES[:3])
    write_parquet(tmp_path / "a.parquet", image=IMAGES[3:])
    for given in (tmp_path, f"{tmp_path}/*.parquet", f"{tmp_path}/{{a,b}}.parquet"):
        source = open_source(given)
        assert source.entries().keys[:5] == [*(f"a.parquet/{row:09d}" for row in range(4)), "b.parquet/000000000"]
        assert source.fetch(source.entries()) == IMAGES[3:] + IMAGES[:3]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_plain_bytes_and_whole_numbers_as_keys(tmp_path, kind):
    path = write_parquet(tmp_path / "p.parquet", picture=pa.array(IMAGES, kind), id=list(range(7)))
    source = open_source(path)
    assert source.entries().keys == [str(index) for index in range(7)] and source.fetch(source.entries()) == IMAGES


def test_columns_are_named_where_they_are_not_clear(tmp_path):
    pair = {"left": pa.array(IMAGES), "right": pa.array(IMAGES[::-1]), "name": KEYS}
    path = write_parquet(tmp_path / "p.parquet", **pair)
    with pytest.raises(UserError, match=r"left, right may all be the column .*image_column"):
        open_source(path).entries()
    source = open_source(path, image_column="right", key_column="name")
    assert source.entries().keys == KEYS and source.fetch(source.entries()) == IMAGES[::-1]
    for options, words in (
        ({"image_column": "middle"}, "no column 'middle': image_column must be one of left, right, name"),
        ({"image_column": "name"}, "holds string, no encoded images"),
        ({"image_column": "left", "key_column": "right"}, "keys are text or whole numbers"),
        ({"image_column": "left", "key_column": "id"}, "no column 'id'"),
    ):
        with pytest.raises(UserError, match=words):
            open_source(path, **options).entries()
    with pytest.raises(UserError, match="none of caption is the column"):
        open_source(write_parquet(tmp_path / "t.parquet", caption=["a"])).entries()


def test_one_row_group_is_read_once(tmp_path, monkeypatch):
    source = open_source(write_parquet(tmp_path / "p.parquet", image=IMAGES, key=KEYS, row_group_size=3))
    groups = []
    read = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda file, index, **options: groups.append(index) or read(file, index, **options),
    )
    assert source.fetch(source.entries()) == IMAGES and groups == [0, 1, 2]


def test_more_files_than_are_kept_open(tmp_path, monkeypatch):
    monkeypatch.setattr("latentvae.data.parquet._FOOTERS", 3)
    monkeypatch.setattr("latentvae.data.storage._OPEN_FILES", 2)
    for index in range(7):
        write_parquet(tmp_path / f"{index}.parquet", image=[IMAGES[index]] * 2)
    source = open_source(tmp_path)
    order = np.random.default_rng(0).permutation(14).tolist() * 2
    contents = source.fetch([source.entries()[index] for index in order])
    assert contents == [IMAGES[index // 2] for index in order]
    assert len(source._groups._opened) == 3 and len(source._groups._files._files) == 2


def test_rows_without_an_image_and_damage_are_image_errors(tmp_path):
    image = [{"bytes": png(1), "path": None}, {"bytes": None, "path": "x/a.png"}, None]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    source = open_source(write_parquet(tmp_path / "p.parquet", image=pa.array(image, kind), key=["a", "b", "c"]))
    good, path_only, empty = source.fetch(source.entries())
    assert good == png(1) and isinstance(path_only, ImageError) and "only the path x/a.png" in str(path_only)
    assert isinstance(empty, ImageError) and "no bytes" in str(empty)
    noise = [np.random.default_rng(index).bytes(4000) for index in range(6)]
    whole = write_parquet(tmp_path / "q.parquet", image=noise, key=KEYS[:6], row_group_size=2).read_bytes()
    (tmp_path / "q.parquet").write_bytes(whole[:1000] + bytes(3000) + whole[4000:])
    source = open_source(tmp_path / "q.parquet")
    contents = source.fetch(source.entries())
    assert contents[4:] == noise[4:]
    assert all(isinstance(content, Exception) for content in contents[:2])  # the page's checksum says so
    for cut in (b"", b"PAR1", whole[:-30]):
        (tmp_path / "q.parquet").write_bytes(cut)
        with pytest.raises(UserError, match=r"q\.parquet cannot be read as a Parquet file"):
            open_source(tmp_path / "q.parquet").entries()


def test_a_row_that_changed_is_never_taken_for_another(tmp_path):
    path = tmp_path / "p.parquet"
    entries = list(open_source(write_parquet(path, image=IMAGES, key=KEYS)).entries())
    write_parquet(path, image=IMAGES[::-1], key=KEYS[::-1])
    contents = ParquetSource([str(path)]).fetch(entries)
    assert contents[3] == IMAGES[3]  # the middle one is where it was
    assert all(isinstance(content, ImageError) for index, content in enumerate(contents) if index != 3)
    write_parquet(path, image=IMAGES[:2], key=KEYS[:2])
    contents = ParquetSource([str(path)]).fetch(entries)
    assert contents[:2] == IMAGES[:2] and all("no longer in row" in str(content) for content in contents[2:])
    entries = list(open_source(write_parquet(path, image=IMAGES)).entries())
    os.utime(path, ns=(0, 10**18))  # without keys, the file's time says whether its rows are the same
    assert all(isinstance(content, ImageError) for content in ParquetSource([str(path)]).fetch(entries))


@pytest.mark.parametrize("names", [["image", "key", "key"], ["image", "image", "key"]])
def test_a_column_that_is_there_twice_is_told(tmp_path, names):
    columns = [pa.array(IMAGES[:2] if name == "image" else KEYS[:2]) for name in names]
    pq.write_table(pa.Table.from_arrays(columns, names), tmp_path / "p.parquet")
    with pytest.raises(UserError, match=rf"has the column '{names[1]}' twice"):
        open_source(tmp_path / "p.parquet").entries()


def test_keys_must_be_there_and_differ(tmp_path):
    for keys, words in ((["a", None, ""], "2 rows have no key.*key_column"), (["a", "b", "a"], "'a' twice")):
        with pytest.raises(UserError, match=words):
            open_source(write_parquet(tmp_path / "p.parquet", image=IMAGES[:3], key=keys)).entries()
    write_parquet(tmp_path / "a.parquet", image=IMAGES[:3], key=KEYS[:3])
    write_parquet(tmp_path / "p.parquet", image=IMAGES[:3])
    with pytest.raises(UserError, match="has no column 'key'"):
        open_source(tmp_path).entries()
    with pytest.raises(UserError, match="no images"):
        open_source(write_parquet(tmp_path / "e.parquet", image=[], key=pa.array([], pa.string()))).entries()


def test_urls_and_mixed_folders(tmp_path):
    data = write_parquet(tmp_path / "p.parquet", image=IMAGES, key=KEYS).read_bytes()
    system = fsspec.filesystem("memory")
    system.pipe("/sets/data/p.parquet", data)
    for url in ("memory://sets", "memory://sets/data/*.parquet"):
        assert open_source(url).fetch(open_source(url).entries()) == IMAGES
    with pytest.raises(UserError, match=r"no \.tar or \.parquet files"):
        system.pipe("/others/a.png", png())
        open_source("memory://others")
    (tmp_path / "s.tar").touch()
    with pytest.raises(UserError, match="give one kind"):
        open_source(tmp_path)


def test_training_reads_parquet(tmp_path):
    images = [png(index, (40, 40)) for index in range(6)]
    path = write_parquet(tmp_path / "p.parquet", image=images, name=KEYS[:6])
    config = DataConfig(source=str(path), key_column="name", resolution=16, num_workers=1)
    source = config.open(PixelFormat())
    options = {"seed": 0, "start_image": 0, "global_batch_size": 6, "micro_batch_size": 6}
    ((batch,),) = [next(training_batches(source, config, PixelFormat(), **options))]
    assert {key: int(image[0, 0, 0]) for key, image in zip(batch.keys, batch.images, strict=True)} == {
        key: index for index, key in enumerate(KEYS[:6])
    }
