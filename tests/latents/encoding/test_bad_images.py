"""Broken, odd and rotated files among real photographs: each in one row, and the photographs as in a clean copy."""

import shutil
import tarfile

import pytest
import torch

from latentvae.images import ImageError, PixelFormat, crop, decode, resize, to_model
from latentvae.latents.encoding.encode import encode_dataset
from latentvae.latents.operating.verify import verify_store
from latentvae.latents.store.files import LatentStore, open_shard
from tests.latents.stores import SETTINGS

FOLDERS = ("bad_images", "pngsuite", "exif_orientation")
OPTIONS = SETTINGS | {"unit_images": 64, "batch_size": 8, "small": "upscale", "dtype": "fp32"}
NUM_OK = {"bad_images": 74, "pngsuite": 162, "exif_orientation": 18}  # as tests/test_images.py has them, by kind


def rows_of(folder):
    """Key -> (index row, mean or None) of all inputs of a store."""
    store, found = LatentStore(folder), {}
    for path in sorted(store.shards.glob("*/u*.json")):
        record = store.read_record(path.parent.name, int(path.stem[1:]))
        shards = {bucket: open_shard(store.folder / name).tensors["mean"] for bucket, name in record.shards.items()}
        for row in store.read_unit_index(record).to_pylist():
            assert row["key"] not in found, f"{row['key']} has two rows"
            found[row["key"]] = row, shards[row["bucket"]][row["row"]] if row["status"] == "ok" else None
    return found


@pytest.fixture
def mixture(shared_data, tmp_path):
    """A folder of twenty photographs, and one of them mixed with all the other files."""
    for path in sorted(shared_data("bsds_test").glob("*.jpg"))[:20]:
        for folder in ("clean", "mixed"):
            (tmp_path / folder / "photographs").mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / folder / "photographs")
    for name in FOLDERS:
        shutil.copytree(shared_data(name), tmp_path / "mixed" / name)
    return tmp_path / "mixed", tmp_path / "clean"


def test_every_file_has_its_row_and_the_good_ones_encode_as_in_a_clean_copy(mixture, vae, tmp_path):
    mixed, clean = mixture
    encode_dataset(clean, vae, tmp_path / "clean_store", **OPTIONS)
    report = encode_dataset(mixed, vae, tmp_path / "mixed_store", **(OPTIONS | {"num_workers": 1}))
    found, expected = rows_of(tmp_path / "mixed_store"), rows_of(tmp_path / "clean_store")
    assert verify_store(tmp_path / "mixed_store").is_whole and report.counts.inputs == len(found)
    for key, (row, mean) in expected.items():
        assert found[key][0]["source_hash"] == row["source_hash"]
        torch.testing.assert_close(found[key][1], mean, rtol=1e-5, atol=1e-6)
    for name in FOLDERS:
        statuses = [row["status"] for key, (row, _) in found.items() if key.startswith(f"{name}/")]
        assert statuses.count("ok") == NUM_OK[name] and set(statuses) == {"ok", "error"} - (
            {"error"} if "exif" in name else set()
        )
    for key, (row, mean) in found.items():
        try:
            array = decode(mixed / key)
        except ImageError as error:
            assert (row["status"], row["row"], row["bucket"]) == ("error", -1, None)
            assert row["error"] == " ".join(str(error).split()), key
            continue
        assert row["status"] == "ok" and (row["width"], row["height"]) == (array.shape[1], array.shape[0]), key
        scaled = resize(array, (row["scaled_width"], row["scaled_height"]))
        pixels = crop(scaled, row["crop_top"], row["crop_left"], 32, 32)
        with torch.no_grad():
            exact = vae.encode(to_model(torch.from_numpy(pixels.copy())[None], PixelFormat())).latent_dist.mean[0]
        torch.testing.assert_close(mean, exact, rtol=1e-4, atol=1e-5, msg=key)


def test_a_tar_gives_what_the_folder_gives(mixture, vae, tmp_path):
    mixed, _ = mixture
    files = sorted(path for path in mixed.rglob("*") if path.is_file())
    with tarfile.open(tmp_path / "all.tar", "w") as archive:
        for path in files:
            archive.add(path, path.relative_to(mixed).as_posix())
    encode_dataset(mixed, vae, tmp_path / "folder_store", **OPTIONS)
    encode_dataset(tmp_path / "all.tar", vae, tmp_path / "tar_store", **OPTIONS)
    folder = rows_of(tmp_path / "folder_store")
    tar = {key.removeprefix("all.tar/"): value for key, value in rows_of(tmp_path / "tar_store").items()}
    assert tar.keys() == folder.keys()
    for key, (row, mean) in folder.items():
        there, other = tar[key]
        same = ("status", "source_hash", "width", "height", "scaled_width", "crop_top", "crop_left")
        assert [there[name] for name in same] == [row[name] for name in same], key
        assert (mean is None) == (other is None)
        if mean is not None:
            torch.testing.assert_close(other, mean, rtol=1e-5, atol=1e-6)
