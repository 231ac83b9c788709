"""LatentDataset: the right latents with the right key, in any order and any process."""

import json
import pickle
import shutil

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch.utils.data import DataLoader

from latentvae.autoencoders.adapter import load_autoencoder
from latentvae.errors import UserError
from latentvae.latents.reading.dataset import LatentDataset
from latentvae.latents.reading.draws import KeyedNormals, item_digests
from latentvae.latents.reading.sampler import BucketBatchSampler
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.model.scaling import LatentScaling
from tests.latents.written import FACTOR, known_tensors, rewrite_unit, write_store


@pytest.fixture
def made(tmp_path):
    return write_store(tmp_path / "store")


def tiny_vae(seed=0):
    torch.manual_seed(seed)
    shape = {"latent_channels": 2, "block_out_channels": [8], "norm_num_groups": 2}
    blocks = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    return AutoencoderKL.from_preset("f8c4-tiny", **shape, **blocks, scaling_factor=1.0)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("kind", ["moments", "mean", "sample"])
def test_latents_are_those_that_were_stored(tmp_path, kind, dtype):
    made = write_store(tmp_path / "store", store=kind, dtype=dtype)
    posterior = "sample" if kind == "sample" else "mode"
    raw = LatentDataset(made.folder, posterior=posterior, normalize=False)
    normalized = LatentDataset(made.folder, posterior=posterior)
    assert raw.keys == made.keys and len(raw) == 17
    name = "sample" if kind == "sample" else "mean"
    for index, key in enumerate(made.keys):
        stored = made.tensors[key][name].float()
        assert torch.equal(raw[index]["latents"], stored) and raw[index]["key"] == key
        torch.testing.assert_close(normalized[index]["latents"], (stored - 0.25) * 0.5)
        assert normalized[index]["latents"].dtype == torch.float32


def test_sizes_are_those_of_the_index(made):
    dataset = LatentDataset(made.folder)
    for item in dataset.__getitems__(range(17)):
        row = made.rows[item["key"]]
        assert item["original_size"] == (row.height, row.width)
        assert item["crop_top_left"] == (row.crop_top, row.crop_left)
        width, height = map(int, row.bucket.split("x"))
        assert item["target_size"] == (height, width)
        assert item["latents"].shape == (2, height // FACTOR, width // FACTOR)
        assert sorted(item) == sorted(dataset.item_fields)


def test_buckets(made):
    dataset = LatentDataset(made.folder)
    assert dataset.bucket_names == ["16x24", "32x32", "48x32"]
    assert dataset.latent_shapes == [(2, 12, 8), (2, 16, 16), (2, 16, 24)]
    for index, key in enumerate(dataset.keys):
        assert dataset.bucket_names[dataset.buckets[index]] == made.rows[key].bucket
        assert tuple(dataset[index]["latents"].shape) == dataset.latent_shapes[dataset.buckets[index]]


def test_a_batch_is_in_the_order_asked_for(made):
    dataset = LatentDataset(made.folder, posterior="sample")
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0)).tolist()
    for item, index in zip(dataset.__getitems__([*order, 3, 3, -1]), [*order, 3, 3, 16], strict=True):
        assert item["key"] == dataset.keys[index]
        assert torch.equal(item["latents"], dataset[index]["latents"])


def test_latents_given_out_are_not_the_store(made):
    dataset = LatentDataset(made.folder, normalize=False)
    before = dataset[0]["latents"].clone()
    dataset[0]["latents"].zero_()
    assert torch.equal(dataset[0]["latents"], before)


def test_sampling_is_keyed_by_seed_epoch_and_key(made):
    dataset = LatentDataset(made.folder, posterior="sample", normalize=False)
    first = dataset[4]["latents"]
    dataset.set_epoch(1)
    assert not torch.equal(first, dataset[4]["latents"])
    dataset.set_epoch(0)
    assert torch.equal(first, dataset[4]["latents"])
    other = LatentDataset(made.folder, posterior="sample", normalize=False, seed=1)
    assert not torch.equal(first, other[4]["latents"])

    stored = made.tensors[dataset.keys[4]]
    noise = np.empty((1, first.numel()), np.float32)
    KeyedNormals().fill(item_digests([dataset.keys[4]], 0, 0), noise)
    expected = stored["mean"] + torch.exp(0.5 * stored["logvar"]) * torch.from_numpy(noise).view_as(first)
    torch.testing.assert_close(first, expected)


def test_samples_have_the_stored_mean_and_variance(tmp_path):
    made = write_store(tmp_path / "store", units=[("64x64", ["a.png"])], channels=4)
    dataset = LatentDataset(made.folder, posterior="sample", normalize=False)
    samples = []
    for epoch in range(200):
        dataset.set_epoch(epoch)
        samples.append(dataset[0]["latents"])
    stored = made.tensors["a.png"]
    standard = (torch.stack(samples) - stored["mean"]) / torch.exp(0.5 * stored["logvar"])
    count = standard.numel()
    assert abs(standard.mean()) < 5 / count**0.5 and abs(standard.var() - 1) < 5 * (2 / count) ** 0.5
    assert (standard.var(0).mean() - 1).abs() < 0.01  # fresh in each epoch, at every position


def test_latent_dist_is_diffusers(made):
    dataset = LatentDataset(made.folder)
    posterior = dataset.latent_dist(2)
    assert isinstance(posterior, DiagonalGaussianDistribution)
    stored = made.tensors[dataset.keys[2]]
    assert torch.equal(posterior.mean, stored["mean"][None]) and torch.equal(posterior.logvar, stored["logvar"][None])
    assert torch.equal(dataset.latent_dist(-1).mean[0], made.tensors[dataset.keys[-1]]["mean"])
    assert torch.equal(posterior.mode()[0], LatentDataset(made.folder, normalize=False)[2]["latents"])


def test_patchified_scaling(tmp_path):
    statistics = tuple(0.1 * channel for channel in range(1, 9))
    scaling = LatentScaling(mean=statistics, std=statistics, patch=2)
    made = write_store(tmp_path / "store", scaling=scaling)
    dataset = LatentDataset(made.folder)
    assert dataset.latent_shapes == [(8, 6, 4), (8, 8, 8), (8, 8, 12)]
    item = dataset[0]["latents"]
    assert item.shape == (8, 8, 8)
    torch.testing.assert_close(scaling.denormalize(item), made.tensors[dataset.keys[0]]["mean"])
    assert LatentDataset(made.folder, normalize=False).latent_shapes[1] == (2, 16, 16)


@pytest.mark.parametrize("kind", ["moments", "mean", "sample"])
def test_half_of_the_images_are_mirrored(tmp_path, kind):
    keys = [f"{index}.png" for index in range(64)]
    made = write_store(tmp_path / "store", store=kind, hflip=True, units=[("8x8", keys)])
    posterior = "sample" if kind == "sample" else "mode"
    dataset = LatentDataset(made.folder, posterior=posterior, normalize=False, hflip=True)
    name = "sample" if kind == "sample" else "mean"
    seen = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        items = dataset.__getitems__(range(64))
        for item in items:
            row, flip = made.rows[item["key"]], item["is_mirrored"]
            assert torch.equal(item["latents"], made.tensors[item["key"]][name + ("_hflip" if flip else "")])
            left = row.scaled_width - row.crop_left - 8 if flip else row.crop_left
            assert item["crop_top_left"] == (0, left)
        seen.append([item["is_mirrored"] for item in items])
        assert 12 <= sum(seen[-1]) <= 52  # five standard errors
        backwards = dataset.__getitems__(range(63, -1, -1))
        assert [item["is_mirrored"] for item in backwards] == seen[-1][::-1]
    assert seen[0] != seen[1]
    plain = LatentDataset(made.folder, posterior=posterior, normalize=False)
    assert torch.equal(plain[5]["latents"], made.tensors[keys[5]][name]) and "is_mirrored" not in plain[5]


def test_worker_processes_read_the_same_and_see_the_epoch(tmp_path):
    made = write_store(tmp_path / "store", hflip=True)
    dataset = LatentDataset(made.folder, posterior="sample", hflip=True)
    dataset[0]  # an open map must not be carried along
    sampler = BucketBatchSampler(dataset, 5)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=2, persistent_workers=True)
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        count = 0
        for batch in loader:
            for latents, key, mirrored in zip(batch["latents"], batch["key"], batch["is_mirrored"], strict=True):
                here = dataset[dataset.keys.index(key)]
                assert torch.equal(latents, here["latents"]) and bool(mirrored) == here["is_mirrored"]
                count += 1
        assert count == 17


@pytest.mark.slow
def test_spawned_workers_read_the_same(made):
    dataset = LatentDataset(made.folder, posterior="sample", filter=pc.field("bucket") == "32x32")
    dataset[0]
    loader = DataLoader(dataset, batch_size=4, num_workers=1, multiprocessing_context="spawn", persistent_workers=True)
    for epoch in (0, 3):
        dataset.set_epoch(epoch)
        latents = torch.cat([batch["latents"] for batch in loader])
        assert torch.equal(
            latents, torch.stack([item["latents"] for item in dataset.__getitems__(range(len(dataset)))])
        )


def test_ten_thousand_shuffled_draws_carry_their_own_key_and_caption(tmp_path):
    """Each latent says its key: the number that the key names, in every element."""
    keys = [f"{index % 7}/{index:04d}.png" for index in range(2000)]
    names = ["8x8", "16x8", "mixed", "8x8"]
    units = [(names[number % 4], keys[start : start + 250]) for number, start in enumerate(range(0, 2000, 250))]
    tensors = {}
    for home, members in units:
        for position, key in enumerate(members):
            width, height = {"8x8": (4, 4), "16x8": (8, 4), "mixed": [(16, 16), (24, 16), (8, 12)][position % 3]}[home]
            tensors[key] = {"mean": torch.full((2, height, width), float(key[2:6]))}
    made = write_store(tmp_path / "store", store="mean", dtype="fp16", units=units, tensors=tensors)
    captions = {key: f"this is {key}" for key in keys}
    dataset = LatentDataset(made.folder, normalize=False, captions=captions)
    sampler = BucketBatchSampler(dataset, 32)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=2, persistent_workers=True)
    draws = 0
    for epoch in range(5):
        sampler.set_epoch(epoch)
        seen = []
        for batch in loader:
            for latents, key, caption in zip(batch["latents"], batch["key"], batch["caption"], strict=True):
                assert torch.all(latents == float(key[2:6])) and caption == f"this is {key}"
                seen.append(key)
        assert sorted(seen) == sorted(keys)
        draws += len(seen)
    assert draws == 10_000


def test_captions_of_the_source_are_read_live(tmp_path):
    images = tmp_path / "images"
    made = write_store(tmp_path / "store", source=str(images))
    for number, key in enumerate(made.keys):
        path = images / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        if number:
            path.with_suffix(".txt").write_text(f"picture {key}", encoding="utf-8")
    dataset = LatentDataset(made.folder, captions=True)
    assert [item["caption"] for item in dataset.__getitems__([0, 5])] == ["", f"picture {made.keys[5]}"]
    (images / made.keys[5]).with_suffix(".txt").write_text("edited", encoding="utf-8")
    assert LatentDataset(made.folder, captions=True)[5]["caption"] == "edited"
    assert LatentDataset(made.folder, captions=str(images))[5]["caption"] == "edited"


def test_fields_of_captions(made):
    known = {key: {"caption": key.upper(), "label": number} for number, key in enumerate(made.keys)}
    dataset = LatentDataset(made.folder, captions=known, fields=["label"])
    assert [item["label"] for item in dataset.__getitems__([4, 2])] == [4, 2]
    batch = next(iter(DataLoader(dataset, batch_size=7)))
    assert batch["label"].tolist() == list(range(7)) and batch["caption"] == [key.upper() for key in made.keys[:7]]
    del known[made.keys[3]]["label"]
    with pytest.raises(UserError, match=r"has no field 'label' in MappingCaptions \(it has: caption\)"):
        LatentDataset(made.folder, captions=known, fields=["label"])[3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"captions": {"else.png": "a dog"}}, "none of the first 17 images has a caption"),
        ({"captions": True}, "captions=True: "),
        ({"fields": ["label"]}, "pass captions too"),
        ({"arrays": {"key": {}}}, "two fields named key"),
    ],
)
def test_joins_that_cannot_be(made, options, message):
    with pytest.raises(UserError, match=message):
        LatentDataset(made.folder, **options)


def test_arrays_join_by_key(made):
    keys = made.keys[::-1]
    table = np.arange(17 * 3, dtype=np.float32).reshape(17, 3)
    mapping = {key: torch.full((2,), float(len(key))) for key in keys}
    dataset = LatentDataset(
        made.folder, arrays={"embedding": (keys, table), "other": mapping, "number": (keys, range(17))}
    )
    for index in (0, 9, 16):
        item = dataset[index]
        place = keys.index(item["key"])
        assert item["embedding"].tolist() == table[place].tolist() and item["number"] == place
        assert torch.equal(item["other"], mapping[item["key"]])
    batch = next(iter(DataLoader(dataset, batch_size=7)))
    assert batch["embedding"].shape == (7, 3)
    item["embedding"].zero_()
    assert table.sum() == np.arange(51).sum()  # what is given out is not the user's own


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda keys: dict.fromkeys(keys[3:], 1), "lacks 3 of 17 keys, the first 'a/image 00.png'"),
        (lambda keys: (keys[:-1], range(16)), "lacks 1 of 17 keys"),
        (lambda keys: (keys, range(16)), "17 keys and 16 values"),
        (lambda keys: ([*keys, keys[0]], range(18)), "1 keys twice"),
        (lambda keys: np.zeros(17), "a mapping or"),
    ],
)
def test_arrays_that_do_not_fit(made, change, message):
    with pytest.raises(UserError, match=message):
        LatentDataset(made.folder, arrays={"embedding": change(made.keys)})


def test_filter(made):
    def wanted(row):
        return row.width > 70

    expected = [key for key in made.keys if wanted(made.rows[key])]
    assert 0 < len(expected) < 17
    by_expression = LatentDataset(made.folder, filter=pc.field("width") > 70)
    by_mask = LatentDataset(made.folder, filter=lambda table: table["width"].to_numpy() > 70)
    by_arrow = LatentDataset(made.folder, filter=lambda table: pc.greater(table["width"], 70))
    for dataset in (by_expression, by_mask, by_arrow):
        assert dataset.keys == expected
        assert [item["key"] for item in dataset.__getitems__(range(len(expected)))] == expected
    by_key = LatentDataset(made.folder, filter=pc.field("key").isin(expected[:2]))
    assert by_key.keys == expected[:2] and len(by_key.bucket_names) <= 2


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (pc.field("wideness") > 1, "does not fit the index .*columns: key"),
        (lambda table: table["wideness"], "does not fit the index"),
        (lambda table: np.ones(3, bool), "a mask of"),
        (lambda table: np.ones(len(table)), "a mask of"),
        (pc.field("width") > 10_000, "leaves none of the latents"),
    ],
)
def test_filters_that_do_not_fit(made, wanted, message):
    with pytest.raises(UserError, match=message):
        LatentDataset(made.folder, filter=wanted)


def test_indices_out_of_range(made):
    dataset = LatentDataset(made.folder)
    assert dataset.__getitems__([]) == []
    for index in (17, -18):
        with pytest.raises(IndexError):
            dataset[index]
        with pytest.raises(IndexError):
            dataset.latent_dist(index)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("mean", {"posterior": "sample"}, "holds the mean alone"),
        ("sample", {}, 'pass posterior="sample"'),
        ("mean", {"posterior": "x"}, "must be"),
        ("mean", {"hflip": True}, "no mirrored latents"),
        ("mean", {"cache_dir": "here"}, "are for URLs"),
    ],
)
def test_what_the_store_does_not_hold_is_refused(tmp_path, kind, options, message):
    made = write_store(tmp_path / "store", store=kind)
    with pytest.raises(UserError, match=message):
        LatentDataset(made.folder, **options)
    if kind == "mean":
        with pytest.raises(UserError, match="a posterior needs --store moments"):
            LatentDataset(made.folder).latent_dist(0)


def test_a_store_in_progress_is_read_only_on_request(tmp_path):
    made = write_store(tmp_path / "store", leave_out=[1], complete=False)
    with pytest.raises(UserError, match=r"is not complete \(1 of 4 units are to be encoded\)"):
        LatentDataset(made.folder)
    assert LatentDataset(made.folder, partial=True).keys == made.keys and len(made.keys) == 14


def test_a_folder_that_is_no_store(tmp_path):
    with pytest.raises(UserError, match="not a latent store"):
        LatentDataset(tmp_path)
    made = write_store(tmp_path / "empty", units=[("8x8", ["a.png"])], bad={"a.png": "error"})
    with pytest.raises(UserError, match="holds no latents"):
        LatentDataset(made.folder)


def test_a_store_mixed_from_two_is_refused_by_field(made, tmp_path):
    other = write_store(tmp_path / "other", fields={"filter": "lanczos", "encoder": "2" * 64})
    for file in other.folder.glob("shards/*/u000001*"):
        shutil.copy(file, made.folder / file.relative_to(other.folder))
    message = r"unit 1 of .* made with other settings: the encoder.*; filter is lanczos there and bicubic here"
    with pytest.raises(UserError, match=message):
        LatentDataset(made.folder)


def test_a_manifest_whose_fields_were_changed(made):
    path = made.store.manifest_path
    values = json.loads(path.read_text(encoding="utf-8"))
    values["fields"]["filter"] = "lanczos"
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(UserError, match="its fingerprint does not belong to its fields"):
        LatentDataset(made.folder)


def test_a_shard_that_was_exchanged_is_refused(made):
    records = [made.store.read_record("32x32", unit) for unit in (0, 1)]
    one, other = (made.folder / record.shards["32x32"] for record in records)
    shutil.copy(other, one)
    with pytest.raises(UserError, match="is not the shard of unit 0"):
        LatentDataset(made.folder)[0]


def test_a_redone_unit_is_never_mixed_with_what_it_was(made):
    keys = made.units[0]
    old = LatentDataset(made.folder, normalize=False)
    new_tensors = {key: known_tensors(f"edited {key}", (2, 16, 16), "moments", "fp32", False) for key in keys}
    rewrite_unit(made, 0, new_tensors)
    assert torch.equal(old[1]["latents"], made.tensors[keys[1]]["mean"])  # its files are still there
    new = LatentDataset(made.folder, normalize=False)
    assert torch.equal(new[1]["latents"], new_tensors[keys[1]]["mean"])
    old.close()
    named = {path for record in made.folder.glob("shards/*/*.json") for path in json.loads(record.read_text())["files"]}
    for path in made.folder.glob("shards/*/u*-*.*"):
        if path.relative_to(made.folder).as_posix() not in named:
            path.unlink()
    with pytest.raises(UserError, match="the store changed since it was opened: open it again"):
        old[1]
    assert torch.equal(new[1]["latents"], new_tensors[keys[1]]["mean"])


def test_the_vae_that_will_decode(tmp_path):
    vae = tiny_vae()
    made = write_store(tmp_path / "store", vae=load_autoencoder(vae))
    assert len(LatentDataset(made.folder, vae=vae)) == 17
    with torch.no_grad():
        next(vae.decoder.parameters()).mul_(2)
    assert len(LatentDataset(made.folder, vae=vae)) == 17
    with torch.no_grad():
        next(vae.encoder.parameters()).view(-1)[0] += 1e-3
    with pytest.raises(UserError, match=r"the encoder .* pass the VAE that made it"):
        LatentDataset(made.folder, vae=vae)


def test_the_same_after_pickling(made):
    dataset = LatentDataset(made.folder, posterior="sample", seed=3, captions={made.keys[0]: "a cat"})
    dataset.set_epoch(2)
    before = dataset[1]["latents"]
    clone = pickle.loads(pickle.dumps(dataset))
    assert clone.epoch == 2 and torch.equal(clone[1]["latents"], before) and clone[0]["caption"] == "a cat"
