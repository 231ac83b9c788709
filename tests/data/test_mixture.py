"""Several sources as one: every image keeps a key of its own, and is read from where it lies."""

import pickle
from collections import Counter

import numpy as np
import pytest
from pydantic import ValidationError

from latentvae.data import DataConfig, FolderSource, MixtureSource, SourceConfig, open_source, plan_summary
from latentvae.errors import UserError
from latentvae.images import ImageError
from tests.data.archives import folder_as_tar, png, write_parquet
from tests.data.batches import RGB, flat, steps


@pytest.fixture
def three(photographs, tmp_path):
    """The same pictures as a folder and as a tar, and two others in a Parquet file."""
    tar = folder_as_tar(photographs, tmp_path / "pictures.tar")
    parquet = write_parquet(tmp_path / "rows.parquet", image=[png(7, (40, 50)), png(9, (60, 40))], id=["a", "b"])
    return [{"source": str(photographs)}, {"source": str(tar)}, {"source": str(parquet), "key_column": "id"}]


def mixed(sources, **fields):
    return DataConfig(sources=sources, resolution=32, num_workers=0, **fields)


def test_keys_say_which_source_and_reads_go_there(three, photographs):
    config = mixed(three)
    source = config.open(RGB)
    assert isinstance(source, MixtureSource) and source.is_sequential and len(source) == 26
    keys = source.entries().keys
    own = FolderSource(photographs).entries().keys
    assert keys[:12] == [f"0/{key}" for key in own] and keys[12] == f"1/pictures.tar/{own[0]}"
    assert keys[24:] == ["2/a", "2/b"] and source.bounds.tolist() == [0, 12, 24, 26]
    folder = FolderSource(photographs)
    for index in range(12):
        assert np.array_equal(source.read(index), folder.read(index))
        assert np.array_equal(source.read(12 + index), folder.read(index))
    assert [source.read(index)[0, 0, 0] for index in (24, 25)] == [7, 9]
    mixed_up = [source.entries()[index] for index in (25, 0, 13, 14, 24)]
    contents = source.fetch(mixed_up)
    assert [source.decode(content).shape for content in contents] == [source.read(i).shape for i in (25, 0, 13, 14, 24)]
    assert np.array_equal(pickle.loads(pickle.dumps(source)).read(13), folder.read(1))
    foreign = open_source([{"key": "7/x", "image": np.zeros((8, 8, 3), np.uint8)}]).entries()
    assert isinstance(source.fetch(foreign)[0], ImageError)


def test_one_source_keeps_its_keys(three, photographs):
    source = mixed(three[:1]).open(RGB)
    assert isinstance(source, FolderSource)
    alone = flat(steps(open_source(photographs)))
    assert flat(steps(source, mixed(three[:1]))) == alone
    assert flat(steps(source, mixed([three[0] | {"repeats": 2}]))) != alone


def test_names_in_place_of_numbers(three):
    source = mixed([three[0] | {"name": "photos"}, three[2]]).open(RGB)
    assert {key.split("/")[0] for key in source.entries().keys} == {"photos", "1"}
    for names in (("a", "a"), ("1", None)):
        with pytest.raises(ValidationError, match="two sources have the name"):
            mixed([three[0] | {"name": names[0]}, three[2] | {"name": names[1]}])
    with pytest.raises(ValidationError, match="name"):
        SourceConfig(source="x", name="a/b")


def test_repeats_weigh_the_sources(three):
    config = mixed([three[0] | {"repeats": 0.5}, three[1], three[2] | {"repeats": 2.5}])
    source = config.open(RGB)
    assert plan_summary(config, source)[0].endswith(": 23 an epoch")
    taken = flat(steps(source, config, batch=23, micro=23, count=2))
    counts = Counter(key for key, _ in taken.values())
    assert all(counts[key] == {"0": 1, "1": 2, "2": 5}[key[0]] for key in source.entries().keys)
    first = Counter(taken[position][0] for position in range(23))
    assert sum(first[key] for key in first if key[0] == "0") == 6 and sum(first[f"2/{name}"] for name in "ab") == 5


def test_copies_of_an_image_are_cut_differently(photographs):
    config = DataConfig(sources=[{"source": str(photographs), "repeats": 4}], resolution=32, num_workers=0)
    taken = flat(steps(config.open(RGB), config, batch=48, micro=48, count=1))
    by_key: dict = {}
    for key, pixels in taken.values():
        by_key.setdefault(key, set()).add(pixels)
    assert len(by_key) == 12 and all(len(cuts) == 4 for cuts in by_key.values())
    plain = {pixels for _, pixels in flat(steps(config.open(RGB), batch=12, micro=12, count=1)).values()}
    assert plain < {pixels for _, pixels in taken.values()}  # the first copy is cut as the only one would be


def test_one_of_source_and_sources(three, photographs):
    with pytest.raises(UserError, match=r"data\.source is not set"):
        DataConfig().open(RGB)
    with pytest.raises(UserError, match=r"data\.source and data\.sources are both set"):
        mixed(three, source=str(photographs)).open(RGB)
    for field in ({"split": "train"}, {"key_column": "id"}, {"streaming": True}):
        with pytest.raises(UserError, match=rf"data\.{next(iter(field))} is set beside data\.sources"):
            mixed(three, **field).open(RGB)
    with pytest.raises(ValidationError, match="greater than 0"):
        SourceConfig(source="x", repeats=0)
    config = mixed([three[0] | {"repeats": 2}, three[1]])
    with pytest.raises(UserError, match=r"not the mixture of data\.sources"):
        steps(open_source(photographs), config)
    with pytest.raises(UserError, match=r"an epoch holds 0\.012 images: raise repeats"):
        steps(open_source(photographs), mixed([three[0] | {"repeats": 0.001}]))


def test_a_source_without_images_is_named(three, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no images in .*empty"):
        mixed([three[0], {"source": str(tmp_path / "empty")}]).open(RGB)
