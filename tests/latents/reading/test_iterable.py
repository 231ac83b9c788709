"""LatentIterableDataset: every item exactly once over ranks and workers, one shape per batch, exact continuation."""

import json
import pickle
import random
from collections import Counter

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from torch.utils.data import DataLoader

from latentvae.errors import UserError
from latentvae.latents.reading.dataset import LatentDataset
from latentvae.latents.reading.iterable import LatentIterableDataset, MixedLatentIterableDataset, buffered
from latentvae.latents.reading.readable import ReadableStore
from latentvae.latents.reading.streams import dealt
from tests.latents.written import write_store


@pytest.fixture
def made(tmp_path):
    """Nine units with latents, of three buckets and mixed, and one of errors alone."""
    keys = [f"{index:03d}.png" for index in range(60)]
    homes = ["8x8", "16x8", "mixed", "8x8", "mixed", "8x8", "16x8", "mixed", "8x8", "8x8"]
    units = [(home, keys[6 * number : 6 * number + 6]) for number, home in enumerate(homes)]
    bad = dict.fromkeys(keys[54:], "error") | {keys[3]: "error"}
    return write_store(tmp_path / "store", units=units, bad=bad)


def keys_of(values):
    return [key for value in values for key in ([value["key"]] if isinstance(value["key"], str) else value["key"])]


@pytest.mark.parametrize("buffer_size", [1, 10, 1000])
def test_items_are_those_of_the_map_style_dataset(made, buffer_size):
    options = {"posterior": "sample", "seed": 4, "captions": {key: f"of {key}" for key in made.keys}}
    dataset = LatentIterableDataset(made.folder, buffer_size=buffer_size, **options)
    known = LatentDataset(made.folder, **options)
    orders = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        known.set_epoch(epoch)
        items = list(dataset)
        assert sorted(keys_of(items)) == sorted(made.keys)
        for item in items[::5]:
            expected = known[known.keys.index(item["key"])]
            assert torch.equal(item["latents"], expected["latents"])
            assert {**item, "latents": 0} == {**expected, "latents": 0} and sorted(item) == sorted(dataset.item_fields)
        orders.append(keys_of(items))
    assert orders[0] != orders[1]
    dataset.set_epoch(0)
    assert keys_of(dataset) == orders[0]
    assert keys_of(LatentIterableDataset(made.folder, buffer_size=buffer_size, seed=5)) != orders[0]


def test_without_shuffle_it_is_the_order_of_the_store(made):
    assert keys_of(LatentIterableDataset(made.folder, shuffle=False)) == made.keys


def test_indexes_are_read_with_their_units(made, monkeypatch):
    dataset, read = LatentIterableDataset(made.folder, buffer_size=7), []
    index = ReadableStore.index
    monkeypatch.setattr(
        ReadableStore, "index", lambda self, unit, columns=None: read.append(unit.number) or index(self, unit, columns)
    )
    values = dataset.draws(0, 0, 1)
    next(values)
    assert len(read) == 2  # what fills the buffer
    assert len(list(values)) == 52 and sorted(read) == list(range(9))


def test_a_buffer_mixes_units():
    """Drawn from a buffer of 50, items stay at about their place, but within a unit no two keep their order."""
    given = [(None, place) for place in range(1000)]
    taken = [place for _, place in buffered(iter(given), 50, random.Random(0))]
    assert sorted(taken) == list(range(1000)) and taken != list(range(1000))
    waits = [position - place for position, place in enumerate(taken)]
    assert min(waits) >= -50 and 5 < np.std(waits[:900]) < 100


@pytest.mark.parametrize(("num_replicas", "num_workers"), [(1, 2), (2, 0), (2, 2), (3, 5)])
def test_every_item_once_over_ranks_and_workers(made, num_replicas, num_workers):
    found = []
    for rank in range(num_replicas):
        dataset = LatentIterableDataset(made.folder, rank=rank, num_replicas=num_replicas)
        mine = keys_of(DataLoader(dataset, batch_size=None, num_workers=num_workers))
        found += mine
        assert mine or num_replicas * max(1, num_workers) > 3
    assert sorted(found) == sorted(made.keys)


def test_persistent_workers_see_the_epoch(made):
    dataset = LatentIterableDataset(made.folder, batch_size=4)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    orders = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        orders.append(keys_of(loader))
        assert sorted(orders[-1]) == sorted(made.keys)
    assert orders[0] == orders[2] != orders[1]


@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_have_one_shape(made, drop_last):
    dataset = LatentIterableDataset(made.folder, batch_size=4, drop_last=drop_last)
    batches = list(DataLoader(dataset, batch_size=None))
    counts = Counter(tuple(batch["latents"].shape[1:]) for batch in batches for _ in batch["key"])
    expected = Counter(
        len(made.tensors[key]["mean"][0]) * 1000 + made.tensors[key]["mean"].shape[2] for key in made.keys
    )
    for shape, count in counts.items():
        whole = expected[shape[1] * 1000 + shape[2]]
        assert count == (whole // 4 * 4 if drop_last else whole)
    assert all(len(batch["key"]) == len(batch["latents"]) <= 4 for batch in batches)
    assert set(counts) <= set(dataset.latent_shapes)
    if drop_last:
        assert all(len(batch["key"]) == 4 for batch in batches)


@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("taken", [0, 1, 7, 13])
def test_a_pass_continues_where_it_was_left(made, batch_size, taken):
    options = {"batch_size": batch_size, "buffer_size": 9, "posterior": "sample", "rank": 1, "num_replicas": 2}
    dataset = LatentIterableDataset(made.folder, **options)
    dataset.set_epoch(2)
    whole = list(dataset)
    running = iter(dataset)
    taken = min(taken, len(whole))
    begun = [next(running) for _ in range(taken)]
    state = json.loads(json.dumps(dataset.state_dict()))
    later = LatentIterableDataset(made.folder, **options)
    later.load_state_dict(state)
    assert later.epoch == 2
    rest = list(later)
    assert keys_of(begun) + keys_of(rest) == keys_of(whole)
    for one, other in zip(rest, whole[taken:], strict=True):
        assert torch.equal(one["latents"], other["latents"])
    later.set_epoch(3)
    dataset.set_epoch(3)
    assert keys_of(later) == keys_of(dataset)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("taken", [1, 6, 11, 15])
def test_a_pass_with_workers_continues_where_it_was_left(made, own, taken):
    """Workers of different lengths, and the DataLoader far ahead of what was taken."""
    options = {"buffer_size": 9, "batch_size": 3 if own else None}
    dataset = LatentIterableDataset(made.folder, **options)

    def loader(dataset):
        return DataLoader(dataset, batch_size=None if own else 3, num_workers=2, collate_fn=None if own else list)

    def keys(batch):
        return batch["key"] if own else [item["key"] for item in batch]

    whole = [keys(batch) for batch in loader(dataset)]
    assert len(whole) >= 15
    running = iter(loader(dataset))
    begun = [keys(next(running)) for _ in range(taken)]
    del running
    state = json.loads(json.dumps(dataset.state_dict(taken, num_workers=2, batch_size=None if own else 3)))
    later = LatentIterableDataset(made.folder, **options)
    later.load_state_dict(state)
    assert begun + [keys(batch) for batch in loader(later)] == whole
    with pytest.raises(UserError, match="2 reading processes and here are 1"):
        next(iter(later))


def test_a_loader_takes_from_its_workers_in_turn():
    assert dealt([3, 3], 0) == [(0, 0), (1, 0)]
    assert dealt([3, 3], 3) == [(1, 1), (0, 2)]
    assert dealt([1, 3, 2], 5) == [(1, 2), (2, 2), (0, 1)]  # 0 1 2, 1 2, then 1
    assert dealt([0, 2], 1) == [(1, 1), (0, 0)]
    assert sorted(dealt([2, 1], 3)) == [(0, 2), (1, 1)]
    with pytest.raises(UserError, match="this epoch has 3"):
        dealt([2, 1], 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed 0 and this dataset 1"),
        ({"batch_size": 2}, "batch_size None and this dataset 2"),
        ({"buffer_size": 8}, "buffer_size"),
        ({"shuffle": False}, "shuffle"),
        ({"filter": pc.field("width") > 0}, "is_filtered"),
        ({"rank": 1, "num_replicas": 2}, "num_replicas"),
    ],
)
def test_a_state_of_another_order_is_refused(made, change, message):
    state = LatentIterableDataset(made.folder).state_dict()
    with pytest.raises(UserError, match=message):
        LatentIterableDataset(made.folder, **change).load_state_dict(state)
    with pytest.raises(UserError, match="reads ahead"):
        LatentIterableDataset(made.folder).state_dict(num_workers=2)


def test_a_state_of_another_store_is_refused(made, tmp_path):
    other = write_store(tmp_path / "other")
    with pytest.raises(UserError, match="has store"):
        LatentIterableDataset(other.folder).load_state_dict(LatentIterableDataset(made.folder).state_dict())


def test_filter_and_arrays(made):
    wanted = [key for key in made.keys if made.rows[key].bucket == "16x8"]
    arrays = {"number": {key: number for number, key in enumerate(wanted)}}
    dataset = LatentIterableDataset(made.folder, filter=pc.field("bucket") == "16x8", arrays=arrays)
    items = list(dataset)
    assert sorted(keys_of(items)) == wanted
    assert all(item["number"] == wanted.index(item["key"]) for item in items)
    loader = DataLoader(dataset, batch_size=None, num_workers=1)
    assert keys_of(loader) == keys_of(items)
    with pytest.raises(UserError, match="array 'number' lacks"):
        list(LatentIterableDataset(made.folder, arrays=arrays))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"posterior": "x"}, "must be"),
        ({"hflip": True}, "no mirrored"),
        ({"buffer_size": 0}, "at least 1"),
        ({"batch_size": 0}, "at least 1"),
        ({"captions": {"else.png": "a dog"}}, "has a caption"),
        ({"num_replicas": 2, "rank": 2}, "must be 0 to 1"),
    ],
)
def test_options_that_do_not_fit(made, options, message):
    with pytest.raises(UserError, match=message):
        LatentIterableDataset(made.folder, **options)


def test_pickle(made):
    dataset = LatentIterableDataset(made.folder, buffer_size=5)
    dataset.set_epoch(3)
    assert keys_of(pickle.loads(pickle.dumps(dataset))) == keys_of(dataset)


def test_stores_without_latents_and_unfinished(tmp_path):
    made = write_store(tmp_path / "empty", units=[("8x8", ["a.png"])], bad={"a.png": "error"})
    with pytest.raises(UserError, match="holds no latents"):
        LatentIterableDataset(made.folder)
    unfinished = write_store(tmp_path / "unfinished", leave_out=[1], complete=False)
    with pytest.raises(UserError, match="is not complete"):
        LatentIterableDataset(unfinished.folder)
    assert sorted(keys_of(LatentIterableDataset(unfinished.folder, partial=True))) == sorted(unfinished.keys)


@pytest.fixture
def two(tmp_path, made):
    units = [("8x8", [f"{number}/{n}.png" for n in range(5)]) for number in range(4)]
    other = write_store(tmp_path / "other", units=units, fields={"filter": "lanczos"})
    return LatentIterableDataset(made.folder, buffer_size=8), LatentIterableDataset(other.folder, buffer_size=8)


@pytest.mark.parametrize("num_workers", [0, 3])
def test_mixed_stores_without_weights(two, made, num_workers):
    mixed = MixedLatentIterableDataset(two)
    for epoch in range(2):
        mixed.set_epoch(epoch)
        found = keys_of(DataLoader(mixed, batch_size=None, num_workers=num_workers))
        assert sorted(found) == sorted([*made.keys, *(f"{number}/{n}.png" for number in range(4) for n in range(5))])
        if not num_workers:
            of_second = [position for position, key in enumerate(found) if "/" in key]
            assert max(np.diff(of_second)) <= 5  # evenly spread: 20 of 73


def test_mixed_stores_with_weights(two):
    mixed = MixedLatentIterableDataset([(two[0], 1.0), (two[1], 2.0)], batch_size=3)
    found = keys_of(mixed)
    counts = Counter(key for key in found if "/" in key)
    assert len(found) == 73 and 48 <= counts.total() <= 49
    assert set(counts.values()) == {2, 3}  # 20 items, two turns and a part of a third
    assert len({key for key in found if "/" not in key}) == 73 - counts.total()
    taken = iter(mixed)
    begun = [next(taken) for _ in range(5)]
    later = MixedLatentIterableDataset([(two[0], 1.0), (two[1], 2.0)], batch_size=3)
    later.load_state_dict(mixed.state_dict())
    assert keys_of(begun) + keys_of(later) == found
    for batch in begun:
        assert batch["latents"].shape[0] <= 3
    with pytest.raises(UserError, match="weights"):
        MixedLatentIterableDataset([(two[0], 1.0), (two[1], 3.0)], batch_size=3).load_state_dict(mixed.state_dict())


def test_a_weight_of_nothing_leaves_a_store_out(two):
    found = keys_of(MixedLatentIterableDataset([(two[0], 0.0), (two[1], 1.0)]))
    assert len(found) == 73 and all("/" in key for key in found)


def test_iterable_stores_that_cannot_be_mixed(two, tmp_path):
    wide = LatentIterableDataset(write_store(tmp_path / "wide", channels=3).folder)
    with pytest.raises(UserError, match="2 and 3 channels"):
        MixedLatentIterableDataset([two[0], wide])
