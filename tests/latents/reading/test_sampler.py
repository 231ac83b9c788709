"""BucketBatchSampler: one shape per batch, every item once, equal numbers for every rank, exact continuation."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from latentvae.errors import UserError
from latentvae.latents.reading.dataset import LatentDataset
from latentvae.latents.reading.mixing import MixedLatentDataset
from latentvae.latents.reading.sampler import BucketBatchSampler
from latentvae.model.scaling import LatentScaling
from tests.latents.written import write_store

ROOT = Path(__file__).parents[3]


@pytest.fixture
def dataset(tmp_path):
    units = [("8x8", [f"a/{n}.png" for n in range(23)]), ("16x8", [f"b/{n}.png" for n in range(10)])]
    made = write_store(tmp_path / "store", units=[*units, ("mixed", ["c/1.png", "c/2.png"])])
    return LatentDataset(made.folder, posterior="sample")


def all_ranks(dataset, batch_size, num_replicas, **options):
    return [
        list(BucketBatchSampler(dataset, batch_size, rank=rank, num_replicas=num_replicas, **options))
        for rank in range(num_replicas)
    ]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_every_item_once_in_batches_of_one_shape(dataset, batch_size):
    sampler = BucketBatchSampler(dataset, batch_size)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert sorted(index for batch in batches for index in batch) == list(range(35))
    for batch in batches:
        assert len(batch) <= batch_size and len({dataset.buckets[index] for index in batch}) == 1
    full = Counter(int(dataset.buckets[batch[0]]) for batch in batches if len(batch) < batch_size)
    assert all(count == 1 for count in full.values())  # one rest for each bucket at most


@pytest.mark.parametrize("num_replicas", [2, 3, 5])
def test_ranks_get_the_same_number_of_equal_batches(dataset, num_replicas):
    ranks = all_ranks(dataset, 4, num_replicas)
    assert len({len(batches) for batches in ranks}) == 1
    for step in zip(*ranks, strict=True):
        assert len({len(batch) for batch in step}) == 1
        assert len({dataset.buckets[index] for batch in step for index in batch}) == 1
    counts = Counter(index for batches in ranks for batch in batches for index in batch)
    assert sorted(counts) == list(range(35))
    for bucket in range(4):
        members = np.flatnonzero(dataset.buckets == bucket).tolist()
        assert sum(counts[index] - 1 for index in members) < num_replicas


def test_drop_last_that_leaves_nothing_is_refused(dataset):
    """A pass without a batch would train nothing, for ever."""
    sampler = BucketBatchSampler(dataset, len(dataset), drop_last=True, rank=1, num_replicas=2)
    with pytest.raises(UserError, match=r"no bucket holds \d+ x 2 items .*: lower batch_size"):
        list(sampler)
    with pytest.raises(UserError, match="drop_last leaves no batch"):
        len(sampler)


def test_drop_last_leaves_full_batches_only(dataset):
    ranks = all_ranks(dataset, 4, 2, drop_last=True)
    assert [len(batches) for batches in ranks] == [3, 3]  # of 23, 10, 1 and 1 items: 2 steps of 8, 1 step, none
    indices = [index for batches in ranks for batch in batches for index in batch]
    assert all(len(batch) == 4 for batches in ranks for batch in batches) and len(set(indices)) == 24


def test_the_order_follows_seed_epoch_and_keys(dataset, tmp_path):
    def keys(sampler):
        return [[sampler.dataset.keys[index] for index in batch] for batch in sampler]

    sampler = BucketBatchSampler(dataset, 4)
    first = keys(sampler)
    assert keys(BucketBatchSampler(dataset, 4)) == first
    assert keys(BucketBatchSampler(dataset, 4, seed=1)) != first
    sampler.set_epoch(1)
    assert dataset.epoch == 1 and keys(sampler) != first
    sampler.set_epoch(0)
    assert keys(sampler) == first

    names = [f"b/{n}.png" for n in range(10)][::-1], [f"a/{n}.png" for n in range(23)][::-1]
    units = [("mixed", ["c/1.png", "c/2.png"]), ("16x8", names[0]), ("8x8", names[1])]
    other = LatentDataset(write_store(tmp_path / "other", units=units).folder)
    assert other.keys != dataset.keys
    assert keys(BucketBatchSampler(other, 4)) == first


def test_without_shuffle_the_store_is_read_in_order(dataset):
    indices = [index for batch in BucketBatchSampler(dataset, 4, shuffle=False) for index in batch]
    of_bucket = [dataset.buckets[index] for index in indices]
    assert of_bucket == sorted(of_bucket)
    for bucket in range(4):
        members = [index for index in indices if dataset.buckets[index] == bucket]
        assert members == sorted(members)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_pass_continues_where_it_was_left(dataset, num_workers):
    def loader(sampler):
        return DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers)

    sampler = BucketBatchSampler(dataset, 4, seed=5)
    sampler.set_epoch(3)
    whole = [batch["key"] for batch in loader(sampler)]
    running = iter(loader(sampler))
    taken = [next(running)["key"] for _ in range(3)]
    state = json.loads(json.dumps(sampler.state_dict(batches=3)))
    if not num_workers:
        assert sampler.state_dict() == state
    del running

    later = BucketBatchSampler(dataset, 4, seed=5)
    later.load_state_dict(state)
    assert later.epoch == dataset.epoch == 3
    rest = [batch["key"] for batch in loader(later)]
    assert taken == whole[:3] and rest == whole[3:]
    later.set_epoch(4)
    sampler.set_epoch(4)
    assert list(later) == list(sampler) and len(later) == len(list(later))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed 0 and this sampler 1"),
        ({"batch_size": 5}, "batch_size 4 and this sampler 5"),
        ({"num_replicas": 2, "rank": 1}, "num_replicas 1 and this sampler 2"),
        ({"drop_last": True}, "drop_last"),
        ({"shuffle": False}, "has shuffle True"),
    ],
)
def test_a_state_of_another_order_is_refused(dataset, change, message):
    state = BucketBatchSampler(dataset, 4).state_dict()
    options = {"batch_size": 4} | change
    with pytest.raises(UserError, match=message):
        BucketBatchSampler(dataset, options.pop("batch_size"), **options).load_state_dict(state)


def test_a_state_of_other_items_is_refused(dataset, tmp_path):
    other = LatentDataset(write_store(tmp_path / "other").folder)
    with pytest.raises(UserError, match="has items"):
        BucketBatchSampler(other, 4).load_state_dict(BucketBatchSampler(dataset, 4).state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "at least 1"),
        ({"batch_size": 2, "rank": 2, "num_replicas": 2}, "must be 0 to 1"),
        ({"batch_size": 2, "rank": 1}, "give both"),
    ],
)
def test_numbers_that_do_not_fit(dataset, options, message):
    with pytest.raises(UserError, match=message):
        BucketBatchSampler(dataset, **options)


def test_the_launcher_tells_the_rank(dataset, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert list(BucketBatchSampler(dataset, 4)) == all_ranks(dataset, 4, 2)[1]


def test_all_ranks_in_turn(dataset):
    ranks = all_ranks(dataset, 4, 2)
    together = list(BucketBatchSampler(dataset, 4, rank="all", num_replicas=2))
    assert together[0::2] == ranks[0] and together[1::2] == ranks[1]


@pytest.fixture
def two(tmp_path):
    one = write_store(tmp_path / "one", units=[("8x8", [f"a/{n}.png" for n in range(12)])])
    units = [("8x8", [f"a/{n}.png" for n in range(4)]), ("16x8", [f"b/{n}.png" for n in range(4)])]
    other = write_store(tmp_path / "other", units=units, fields={"filter": "lanczos"})
    return LatentDataset(one.folder), LatentDataset(other.folder)


def test_concatenated_stores(two):
    mixed = MixedLatentDataset(two)
    assert len(mixed) == 20 and mixed.keys == two[0].keys + two[1].keys
    order = [19, 0, 12, 11, -1]
    for item, index in zip(mixed.__getitems__(order), order, strict=True):
        index = index % 20
        expected = two[0][index] if index < 12 else two[1][index - 12]
        assert item["key"] == expected["key"] and torch.equal(item["latents"], expected["latents"])
        assert tuple(item["latents"].shape) == mixed.latent_shapes[mixed.buckets[index]]
    assert mixed.__getitems__([]) == []
    with pytest.raises(IndexError):
        mixed[20]
    for epoch in range(2):
        sampler = BucketBatchSampler(mixed, 4)
        sampler.set_epoch(epoch)
        assert two[1].epoch == epoch
        assert sorted(index for batch in sampler for index in batch) == list(range(20))
    loader = DataLoader(mixed, batch_sampler=BucketBatchSampler(mixed, 4), num_workers=1)
    assert sum(len(batch["key"]) for batch in loader) == 20


def test_weights_are_shares_of_the_draws(two):
    mixed = MixedLatentDataset([(two[0], 1.0), (two[1], 3.0)])
    assert mixed.draws == [5, 15]
    sampler = BucketBatchSampler(mixed, 4)
    counts = Counter()
    for epoch in range(24):
        sampler.set_epoch(epoch)
        drawn = [index for batch in sampler for index in batch]
        assert sum(index < 12 for index in drawn) == 5 and len(drawn) == 20
        for batch in sampler:
            assert len({mixed.buckets[index] for index in batch}) == 1
        counts.update(drawn)
    # 24 * 5 draws of 12 items and 24 * 15 of 8: whole passes, so every item came as often as its neighbours
    assert {counts[index] for index in range(12)} == {10} and {counts[index] for index in range(12, 20)} == {45}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1.0, None), "1 of 2 datasets"),
        ((-1.0, 2.0), "0 or more"),
        ((0.0, 0.0), "not all 0"),
        ((float("nan"), 1.0), "0 or more"),
    ],
)
def test_weights_that_are_none(two, weights, message):
    entries = [each if weight is None else (each, weight) for each, weight in zip(two, weights, strict=True)]
    with pytest.raises(UserError, match=message):
        MixedLatentDataset(entries)


def test_stores_that_cannot_be_mixed(two, tmp_path):
    wide = LatentDataset(write_store(tmp_path / "wide", channels=3).folder)
    with pytest.raises(UserError, match="2 and 3 channels"):
        MixedLatentDataset([two[0], wide])
    patched = LatentDataset(write_store(tmp_path / "patched", scaling=LatentScaling(patch=2)).folder)
    with pytest.raises(UserError, match="2 and 8 channels"):
        MixedLatentDataset([two[0], patched])
    captioned = LatentDataset(two[0].store.name, captions={two[0].keys[0]: "a cat"})
    with pytest.raises(UserError, match="only one has caption"):
        MixedLatentDataset([two[1], captioned])
    with pytest.raises(UserError, match="the same normalize"):
        MixedLatentDataset([two[0], LatentDataset(two[1].store.name, normalize=False)])
    with pytest.raises(UserError, match="at least one"):
        MixedLatentDataset([])


@pytest.mark.multiprocess
@pytest.mark.parametrize("prepared", [False, True])
def test_two_processes_of_accelerate(dataset, tmp_path, prepared):
    """Each gets its ranks' batches, in two epochs, whether or not Accelerate prepares the DataLoader."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = ["-m", "tests.latents.reading.test_sampler", dataset.store.name, str(tmp_path), str(int(prepared))]
    subprocess.run([*launch, *arguments], check=True, env=environment, cwd=ROOT, timeout=300)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        for rank in range(2):
            sampler = BucketBatchSampler(dataset, 4, rank=rank, num_replicas=2)
            sampler.set_epoch(epoch)
            expected = [[dataset.keys[index] for index in batch] for batch in sampler]
            found = json.loads((tmp_path / f"{rank}-{epoch}.json").read_text(encoding="utf-8"))
            assert found == {"keys": expected, "noise": dataset[0]["latents"].sum().item(), "length": len(expected)}


def _trained_by_accelerate(store: str, out: str, prepared: str) -> None:
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(even_batches=False))
    dataset = LatentDataset(store, posterior="sample")
    if int(prepared):
        sampler = BucketBatchSampler(dataset, 4, rank="all", num_replicas=accelerator.num_processes)
        loader = accelerator.prepare(DataLoader(dataset, batch_sampler=sampler))
    else:
        sampler = BucketBatchSampler(dataset, 4)
        loader = DataLoader(dataset, batch_sampler=sampler)
    for epoch in range(2):
        (loader if int(prepared) else sampler).set_epoch(epoch)
        keys = [batch["key"] for batch in loader]
        result = {"keys": keys, "noise": dataset[0]["latents"].sum().item(), "length": len(loader)}
        text = json.dumps(result)
        Path(out, f"{accelerator.process_index}-{epoch}.json").write_text(text, encoding="utf-8")
    accelerator.end_training()


if __name__ == "__main__":
    _trained_by_accelerate(*sys.argv[1:])
