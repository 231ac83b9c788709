"""decode_store: pictures by key."""

import numpy as np
import pytest
import torch
from PIL import Image

from latentvae.checkpoint import save_model
from latentvae.errors import UserError
from latentvae.images import PixelFormat, from_model
from latentvae.latents.dataset import LatentDataset
from latentvae.latents.decode import decode_store, picture_names
from latentvae.latents.encode import encode_dataset
from tests.latents.stores import SETTINGS, tiny_vae


def test_pictures_are_the_decoded_mean(encode, vae, tmp_path):
    encode(dtype="fp32")
    report = decode_store(tmp_path / "store", tmp_path / "out", vae=vae, batch_size=5, progress=False)
    assert report.num_images == report.total == 12 and report.notes == []
    dataset = LatentDataset(tmp_path / "store", normalize=False)
    for item in (dataset[0], dataset[11]):
        with torch.no_grad():
            expected = from_model(vae.decode(item["latents"][None]).sample, PixelFormat())[0].numpy()
        picture = np.asarray(Image.open((tmp_path / "out" / item["key"]).with_suffix(".png")))
        assert np.abs(picture.astype(int) - expected).max() <= 1  # rounding at the boundary


def test_the_model_named_in_the_store_is_loaded(encode, vae, tmp_path):
    save_model(vae, tmp_path / "model")
    encode(vae=str(tmp_path / "model"))
    report = decode_store(tmp_path / "store", tmp_path / "out", limit=2, progress=False)
    assert report.num_images == 2 and len(list((tmp_path / "out").rglob("*.png"))) == 2
    assert "2 of 12 latents decoded" in str(report)


def test_a_model_that_is_not_there_any_more_must_be_given(encode, vae, tmp_path):
    save_model(vae, tmp_path / "model")
    encode(vae=str(tmp_path / "model"))
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"made with the VAE .*model, which does not load here: .*; pass --vae"):
        decode_store(tmp_path / "store", tmp_path / "out", progress=False)


def test_long_keys_become_names_that_fit(tmp_path):
    keys = ["é" * 120 + ".jpg", "é" * 120 + ".png", "x" * 5000 + "/y.jpg"]
    images = [{"key": key, "image": np.zeros((8, 8, 3), np.uint8)} for key in keys]
    vae = tiny_vae()
    encode_dataset(images, vae, tmp_path / "store", **(SETTINGS | {"resolution": 8}))
    decode_store(tmp_path / "store", tmp_path / "out", vae=vae, progress=False)
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3


def test_without_a_name_the_model_must_be_given(encode, tmp_path):
    encode()
    with pytest.raises(UserError, match="limit is 0"):
        decode_store(tmp_path / "store", tmp_path / "out", limit=0, progress=False)
    with pytest.raises(UserError, match="pass --vae"):
        decode_store(tmp_path / "store", tmp_path / "out", progress=False)
    with pytest.raises(UserError, match="has 2 latent channels, the VAE 3"):
        decode_store(tmp_path / "store", tmp_path / "out", vae=tiny_vae(latent_channels=3), progress=False)


def test_another_model_is_noted(encode, tmp_path):
    encode()
    report = decode_store(tmp_path / "store", tmp_path / "out", vae=tiny_vae(seed=1), limit=1, progress=False)
    assert "encoder is not the one that made the store" in report.notes[0]


def test_gray_16_bit_pictures(tmp_path):
    folder = tmp_path / "gray"
    folder.mkdir()
    ramp = np.linspace(0, 65535, 32 * 32, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(ramp).save(folder / "a.png")
    vae = tiny_vae(channels=1)
    encode_dataset(folder, vae, tmp_path / "store", pixels=PixelFormat(channels=1, dtype="uint16"), **SETTINGS)
    decode_store(tmp_path / "store", tmp_path / "out", vae=vae, progress=False)
    picture = Image.open(tmp_path / "out" / "a.png")
    assert picture.mode == "I;16" and len(np.unique(np.asarray(picture))) > 256


def test_a_store_of_samples_is_decoded(encode, vae, tmp_path):
    encode(store="sample")
    assert decode_store(tmp_path / "store", tmp_path / "out", vae=vae, progress=False).num_images == 12


def test_picture_names_stay_apart_and_inside():
    assert picture_names(["a/b.jpg", "a/c.d.webp"]) == ["a/b.png", "a/c.d.png"]
    assert picture_names(["a.jpg", "a.png"]) == ["a.jpg.png", "a.png.png"]
    assert picture_names(["../../a.jpg", "/b.jpg", "C:/c.jpg"]) == ["a.png", "b.png", "C_/c.png"]
    assert picture_names(["..\\..\\a.jpg", 'b?"\0\n.jpg']) == [".._.._a.png", "b____.png"]
    assert picture_names(["a.png/b.jpg", "a.jpg"]) == ["a.png/b.jpg.png", "a.jpg.png"]  # no file where a folder is
    assert len({name.lower() for name in picture_names(["a.jpg", "A.jpg", "../a.jpg", "_/a.jpg"])}) == 4
