"""Datasets of the `datasets` library: saved, made in Python, and folders that stand for a hub repository."""

import os
import pickle
import time

import numpy as np
import pytest

from latentvae.data import open_source
from latentvae.data.hub_dataset import DatasetSource, open_hub
from latentvae.data.parquet import ParquetSource
from latentvae.data.tar import TarSource
from latentvae.errors import UserError
from latentvae.images import ImageError
from tests.data.archives import png, write_parquet, write_tar

datasets = pytest.importorskip("datasets")

IMAGES = [png(index) for index in range(5)]
KEYS = [f"k{index}" for index in range(5)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The library's own cache, out of the way."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def dataset(images=IMAGES, **columns):
    values = {"image": [{"bytes": data, "path": None} for data in images], **columns}
    return datasets.Dataset.from_dict(values).cast_column("image", datasets.Image())


def test_a_saved_dataset_by_row(tmp_path):
    dataset(label=list(range(5))).save_to_disk(tmp_path / "saved")
    source = open_source(tmp_path / "saved")
    assert isinstance(source, DatasetSource) and source.is_sequential
    assert source.entries().keys == [f"saved/{row:09d}" for row in range(5)]
    assert source.fetch(source.entries()) == IMAGES and source.fetch(list(source.entries())[::-1]) == IMAGES[::-1]
    assert [int(source.read(index)[0, 0, 0]) for index in (4, 0)] == [4, 0]
    copy = pickle.loads(pickle.dumps(source))
    assert copy.entries() == source.entries() and copy.fetch(list(source.entries())) == IMAGES
    fresh = open_source(tmp_path / "saved")
    assert fresh.fetch(list(source.entries())) == IMAGES and fresh._entries is None


def test_an_arrow_file(tmp_path):
    dataset(key=KEYS).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    source = open_source(arrow)
    assert source.entries().keys == KEYS and source.fetch(source.entries()) == IMAGES
    arrow.write_bytes(b"no arrow")
    with pytest.raises(UserError, match="cannot be read as a dataset"):
        open_source(arrow)


def test_splits_must_be_chosen_where_there_are_several(tmp_path):
    both = datasets.DatasetDict({"train": dataset(), "test": dataset(IMAGES[:2])})
    both.save_to_disk(tmp_path / "saved")
    for given in (tmp_path / "saved", both):
        assert open_source(given, split="test").entries().keys == ["test/000000000", "test/000000001"]
        for split, words in ((None, "none was named"), ("dev", "'dev' is not one of them")):
            with pytest.raises(UserError, match=rf"has the splits train, test, and {words}: choose one with split"):
                open_source(given, split=split)


def test_a_split_that_was_saved_again_is_another(tmp_path):
    datasets.DatasetDict({"train": dataset(), "test": dataset(IMAGES[:2])}).save_to_disk(tmp_path / "saved")
    before = open_source(tmp_path / "saved", split="test").entries()
    time.sleep(0.02)
    dataset(IMAGES[2:4]).save_to_disk(tmp_path / "saved" / "test")
    after = open_source(tmp_path / "saved", split="test")
    assert after.entries().keys == before.keys and after.entries()[0].mtime_ns > before[0].mtime_ns
    assert all("has changed since it was listed" in str(content) for content in after.fetch(before))


def test_images_beside_a_file_named_like_a_datasets_are_a_folder(tmp_path):
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "a.png").write_bytes(png())
    assert open_source(tmp_path).entries().keys == ["a.png"]


def test_a_dataset_from_python(tmp_path):
    (tmp_path / "a.png").write_bytes(png(9))
    given = datasets.Dataset.from_dict(
        {"picture": [str(tmp_path / "a.png"), str(tmp_path / "b.png")], "name": ["a", "b"]}
    )
    source = open_source(given.cast_column("picture", datasets.Image()), key_column="name")
    assert source.entries().keys == ["a", "b"]
    content, absent = source.fetch(source.entries())
    assert content == png(9) and isinstance(absent, FileNotFoundError)
    with pytest.raises(UserError, match="is the column of encoded images"):
        open_source(given)
    with pytest.raises(UserError, match="'k0' twice"):
        open_source(dataset(key=["k0"] * 5)).entries()
    with pytest.raises(UserError, match="was asked for"):
        open_source(dataset(), split="test")


def test_rows_that_changed_are_never_taken_for_others(tmp_path):
    entries = list(open_source(dataset(key=KEYS)).entries())
    contents = open_source(dataset(IMAGES[::-1], key=KEYS[::-1])).fetch(entries)
    assert contents[2] == IMAGES[2]
    assert all(isinstance(content, ImageError) for index, content in enumerate(contents) if index != 2)
    contents = open_source(dataset(IMAGES[:2], key=KEYS[:2])).fetch(entries)
    assert contents[:2] == IMAGES[:2] and all("no longer in row" in str(content) for content in contents[2:])
    dataset().save_to_disk(tmp_path / "saved")
    entries = list(open_source(tmp_path / "saved").entries())
    os.utime(tmp_path / "saved" / "state.json", ns=(0, 10**18))
    assert all(isinstance(content, ImageError) for content in open_source(tmp_path / "saved").fetch(entries))


# --- hf: ---


@pytest.fixture
def repository(tmp_path):
    """A folder laid out as a dataset repository of Parquet files."""
    root = tmp_path / "repository"
    write_parquet(root / "data" / "train-00000-of-00002.parquet", image=IMAGES[:3], key=KEYS[:3])
    write_parquet(root / "data" / "train-00001-of-00002.parquet", image=IMAGES[3:], key=KEYS[3:])
    write_parquet(root / "data" / "test-00000-of-00001.parquet", image=IMAGES[:1], key=["t"])
    return root


def test_hub_dataset_downloaded_or_in_place_is_the_same(repository):
    whole = open_source(f"hf:{repository}?split=train")
    parts = open_source(f"hf:{repository}?split=train&streaming=1")
    assert isinstance(whole, DatasetSource) and isinstance(parts, ParquetSource)
    for source in (whole, parts, open_source(f"hf:{repository}", split="train", streaming=True)):
        assert source.entries().keys == KEYS and source.fetch(source.entries()) == IMAGES
    assert open_source(f"hf:{repository}?split=test").entries().keys == ["t"]
    with pytest.raises(UserError, match="has the splits"):
        open_source(f"hf:{repository}")
    with pytest.raises(UserError, match="no option 'spilt'; known are split, config"):
        open_source(f"hf:{repository}?spilt=train")
    with pytest.raises(UserError, match="write it as hf:owner/name"):
        open_source("hf:?split=train")


def test_streaming_tars_and_what_cannot_be_streamed(tmp_path):
    write_tar(tmp_path / "tars" / "a.tar", {"0.png": png(1), "1.png": png(2)})
    source = open_source(f"hf:{tmp_path / 'tars'}", streaming=True)
    assert isinstance(source, TarSource) and source.entries().keys == ["a.tar/0.png", "a.tar/1.png"]
    assert source.fetch(source.entries()) == [png(1), png(2)]
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "a.png").write_bytes(png(3))
    with pytest.raises(UserError, match="only Parquet and tar can be streamed; leave streaming out"):
        open_source(f"hf:{tmp_path / 'loose'}", streaming=True)
    whole = open_source(f"hf:{tmp_path / 'loose'}")
    assert whole.fetch(whole.entries()) == [png(3)]


def test_without_a_network_it_is_told_at_once(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def unreachable(*_, timeout, **__):
        assert timeout <= 10
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"hub cannot be reached .*HF_HUB_OFFLINE=1") as caught:
        open_hub("hf:owner/name", None, None)
    assert "\n" not in str(caught.value) and time.monotonic() - began < 30  # the library's own attempts take longer

    def absent(*_, **__):
        error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
        Exception.__init__(error, "404\nClient Error")
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", absent)
    with pytest.raises(UserError, match="no such dataset or revision"):
        open_hub("hf:owner/name", None, None)


def test_the_commit_is_pinned(monkeypatch, repository):
    """What was listed and what is read later are of one commit."""
    import huggingface_hub

    seen = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: type("Info", (), {"sha": "0123abc"}))
    builder, load = datasets.load_dataset_builder, datasets.load_dataset

    def local(function):
        def called(path, *arguments, revision, **options):
            seen.append((path, revision))
            return function(str(repository), *arguments, **options)

        return called

    monkeypatch.setattr(datasets, "load_dataset_builder", local(builder))
    monkeypatch.setattr(datasets, "load_dataset", local(load))
    source = open_source("hf:owner/name?split=train")
    assert seen == [("owner/name", "0123abc")] * 2
    assert source.name == "hf:owner/name@0123abc?split=train" and source.entries()[0].uri == source.name
    assert np.array_equal(source.read(3), open_source(f"hf:{repository}?split=train").read(3))
