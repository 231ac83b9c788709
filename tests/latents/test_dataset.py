"""LatentDataset: the right latents with the right key, in any order and any process."""

import pickle
import shutil

import pytest
import torch
from torch.utils.data import DataLoader

from latentvae.errors import UserError
from latentvae.images import PixelFormat, center_crop, decode, resize_shorter_side, to_model
from latentvae.keyed import keyed_noise
from latentvae.latents.dataset import LatentDataset
from latentvae.latents.store import LatentStore
from tests.latents.stores import tiny_vae


@pytest.fixture
def store(encode, tmp_path):
    encode(dtype="fp32")
    return tmp_path / "store"


def test_items_are_normalized_by_default(store):
    normalized, raw = LatentDataset(store), LatentDataset(store, normalize=False)
    assert len(normalized) == 12 and normalized.scaling.scale == 0.5
    item = normalized[3]
    assert item["latents"].shape == (2, 16, 16) and item["latents"].dtype == torch.float32
    torch.testing.assert_close(item["latents"], (raw[3]["latents"] - 0.25) * 0.5)


def test_every_latent_carries_its_own_key_in_any_order(store, vae, photographs):
    expected = {}
    for path in photographs.rglob("*.*"):
        array = center_crop(resize_shorter_side(decode(path), 32), 32)
        with torch.no_grad():
            pixels = to_model(torch.from_numpy(array.copy()), PixelFormat())
            expected[path.relative_to(photographs).as_posix()] = vae.encode(pixels).latent_dist.mean[0]
    dataset = LatentDataset(store, normalize=False)
    assert sorted(dataset.keys) == sorted(expected)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    for item in dataset.__getitems__([*order, 3, 3, -1]):
        torch.testing.assert_close(item["latents"], expected[item["key"]], rtol=1e-4, atol=1e-5)
    assert [item["key"] for item in dataset.__getitems__(order)] == [dataset.keys[index] for index in order]


def test_sampling_is_keyed_by_seed_epoch_and_key(store):
    dataset = LatentDataset(store, posterior="sample", normalize=False)
    mode = LatentDataset(store, normalize=False)
    first = dataset[4]["latents"]
    assert torch.equal(first, dataset.__getitems__([1, 4, 2])[1]["latents"])
    dataset.set_epoch(1)
    assert not torch.equal(first, dataset[4]["latents"])
    dataset.set_epoch(0)
    assert torch.equal(first, dataset[4]["latents"])
    assert not torch.equal(first, LatentDataset(store, posterior="sample", normalize=False, seed=1)[4]["latents"])

    posterior = mode.latent_dist(4)
    noise = keyed_noise((2, 16, 16), 0, 0, dataset.keys[4])
    torch.testing.assert_close(first, posterior.mean[0] + posterior.std[0] * noise)


def test_latent_dist_is_what_diffusers_gives(store, vae, photographs):
    dataset = LatentDataset(store)
    array = center_crop(resize_shorter_side(decode(photographs / dataset.keys[2]), 32), 32)
    with torch.no_grad():
        expected = vae.encode(to_model(torch.from_numpy(array.copy()), PixelFormat())).latent_dist
    posterior = dataset.latent_dist(2)
    assert type(posterior) is type(expected)
    torch.testing.assert_close(posterior.mean, expected.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(posterior.logvar, expected.logvar, rtol=1e-4, atol=1e-5)


def test_worker_processes_read_the_same_and_see_the_epoch(store):
    dataset = LatentDataset(store, posterior="sample")
    dataset[0]  # an open map must not be carried along
    loader = DataLoader(dataset, batch_size=5, num_workers=2, persistent_workers=True)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        batches = list(loader)
        latents = torch.cat([batch["latents"] for batch in batches])
        here = torch.stack([dataset[index]["latents"] for index in range(12)])
        assert torch.equal(latents, here)
        assert [key for batch in batches for key in batch["key"]] == dataset.keys
    assert [size.tolist() for size in batches[0]["original_size"]] == [[72] * 5, [96] * 5]


def test_pickle(store):
    dataset = LatentDataset(store, posterior="sample", seed=3)
    dataset.set_epoch(2)
    before = dataset[1]["latents"]
    clone = pickle.loads(pickle.dumps(dataset))
    assert clone.epoch == 2 and torch.equal(clone[1]["latents"], before)


def test_indices_out_of_range(store):
    dataset = LatentDataset(store)
    assert dataset.__getitems__([]) == []
    assert dataset[-1]["key"] == dataset[11]["key"]
    for index in (12, -13):
        with pytest.raises(IndexError):
            dataset[index]


@pytest.mark.parametrize(
    ("kind", "posterior", "message"),
    [
        ("mean", "sample", "holds the mean alone"),
        ("sample", "mode", 'pass posterior="sample"'),
        ("mean", "x", "must be"),
    ],
)
def test_what_the_store_does_not_hold_is_refused(encode, tmp_path, kind, posterior, message):
    encode(store=kind)
    with pytest.raises(UserError, match=message):
        LatentDataset(tmp_path / "store", posterior=posterior)
    if kind == "mean":
        with pytest.raises(UserError, match="a posterior needs --store moments"):
            LatentDataset(tmp_path / "store").latent_dist(0)


def test_a_store_in_progress_is_read_only_on_request(store):
    LatentStore(store).paths("32x32", 1)[2].unlink()
    with pytest.raises(UserError, match=r"is not complete \(1 of 4 units are to be encoded\)"):
        LatentDataset(store)
    assert len(LatentDataset(store, partial=True)) == 9


def test_a_mixed_store_is_refused_by_field(store, encode, tmp_path):
    encode("other", vae=tiny_vae(seed=1), dtype="fp32", filter="lanczos")
    for mine, theirs in zip(
        LatentStore(store).paths("32x32", 1), LatentStore(tmp_path / "other").paths("32x32", 1), strict=True
    ):
        shutil.copy(theirs, mine)
    with pytest.raises(
        UserError, match=r"unit 1 of .* made with other settings: the encoder.*; filter is lanczos there"
    ):
        LatentDataset(store)


def test_a_shard_that_was_exchanged_is_refused(store):
    one, other = (LatentStore(store).paths("32x32", unit)[0] for unit in (0, 1))
    shutil.copy(other, one)
    with pytest.raises(UserError, match="is not the shard of unit 0"):
        LatentDataset(store)[0]
