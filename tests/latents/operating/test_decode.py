"""decode_store: pictures by key."""

import numpy as np
import pytest
import torch
from PIL import Image

from latentvae.autoencoders.adapter import load_autoencoder
from latentvae.checkpoint import save_model
from latentvae.errors import UserError
from latentvae.images import PixelFormat, from_model
from latentvae.latents.operating.decode import decode_store, picture_names
from tests.latents.stores import tiny_vae
from tests.latents.written import write_store


@pytest.fixture
def vae():
    return tiny_vae()


def written(tmp_path, vae, **options):
    return write_store(tmp_path / "store", vae=load_autoencoder(vae), **options)


@pytest.mark.parametrize("hflip", [False, True])
def test_pictures_are_the_decoded_mean_in_every_bucket(vae, tmp_path, hflip):
    made = written(tmp_path, vae, hflip=hflip)
    report = decode_store(made.folder, tmp_path / "out", vae=vae, batch_size=3, progress=False)
    assert report.num_images == report.total == 17 and report.notes == []
    sizes = set()
    for key, tensors in made.tensors.items():
        with torch.no_grad():
            expected = from_model(vae.decode(tensors["mean"][None]).sample, PixelFormat())[0].numpy()
        picture = np.asarray(Image.open((tmp_path / "out" / key).with_suffix(".png")))
        assert np.abs(picture.astype(int) - expected).max() <= 1  # rounding at the boundary
        sizes.add(f"{picture.shape[1]}x{picture.shape[0]}")
        assert made.rows[key].bucket == f"{picture.shape[1]}x{picture.shape[0]}"
    assert sizes == {"32x32", "48x32", "16x24"}
    assert len(list((tmp_path / "out").rglob("*.png"))) == 17


def test_the_model_named_in_the_store_is_loaded(vae, tmp_path):
    save_model(vae, tmp_path / "model")
    made = written(tmp_path, str(tmp_path / "model"))
    report = decode_store(made.folder, tmp_path / "out", limit=2, progress=False)
    assert report.num_images == 2 and len(list((tmp_path / "out").rglob("*.png"))) == 2
    assert "2 of 17 latents decoded" in str(report)
    (tmp_path / "model").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"made with the VAE .*model, which does not load here: .*; pass --vae"):
        decode_store(made.folder, tmp_path / "out", progress=False)


def test_other_classes_decode_too(tmp_path):
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    tiny = AutoencoderTiny(
        latent_channels=2,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()
    made = written(tmp_path, tiny, store="mean")
    decode_store(made.folder, tmp_path / "out", vae=tiny, progress=False)
    key = made.keys[0]
    with torch.no_grad():
        expected = from_model(tiny.decode(made.tensors[key]["mean"][None]).sample, PixelFormat())[0].numpy()
    picture = np.asarray(Image.open((tmp_path / "out" / key).with_suffix(".png")))
    assert np.abs(picture.astype(int) - expected).max() <= 1


def test_long_keys_become_names_that_fit(vae, tmp_path):
    keys = ["é" * 120 + ".jpg", "é" * 120 + ".png", "x" * 5000 + "/y.jpg"]
    made = written(tmp_path, vae, units=[("32x32", keys)])
    decode_store(made.folder, tmp_path / "out", vae=vae, progress=False)
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3


def test_mistakes(vae, tmp_path):
    made = written(tmp_path, vae)
    with pytest.raises(UserError, match="limit is 0"):
        decode_store(made.folder, tmp_path / "out", limit=0, progress=False)
    with pytest.raises(UserError, match=r"does not name a VAE .*: pass --vae"):
        decode_store(made.folder, tmp_path / "out", progress=False)
    with pytest.raises(UserError, match="has 2 latent channels, the VAE 3"):
        decode_store(made.folder, tmp_path / "out", vae=tiny_vae(latent_channels=3), progress=False)
    empty = write_store(tmp_path / "empty", units=[("32x32", ["a.png"])], bad={"a.png": "error"})
    with pytest.raises(UserError, match="holds no latents"):
        decode_store(empty.folder, tmp_path / "out", vae=vae, progress=False)
    (made.folder / next(made.folder.glob("shards/*/*.safetensors"))).unlink()
    with pytest.raises(UserError, match="the store changed since it was opened: open it again"):
        decode_store(made.folder, tmp_path / "out", vae=vae, progress=False)


def test_another_model_is_noted(vae, tmp_path):
    made = written(tmp_path, vae)
    report = decode_store(made.folder, tmp_path / "out", vae=tiny_vae(seed=1), limit=1, progress=False)
    assert "encoder is not the one that made the store" in report.notes[0]
    same_encoder = tiny_vae()
    with torch.no_grad():
        same_encoder.decoder.conv_out.bias.add_(1)
    report = decode_store(made.folder, tmp_path / "again", vae=same_encoder, limit=1, progress=False)
    assert "this decoder is another" in report.notes[0]


def test_pictures_do_not_go_into_a_store(vae, tmp_path):
    made = written(tmp_path, vae)
    with pytest.raises(UserError, match="store is a latent store: choose another --out"):
        decode_store(made.folder, made.folder, vae=vae, progress=False)
    assert not list(made.folder.rglob("*.png"))


@pytest.mark.parametrize("name", ["a.png", "a.npy"])
def test_the_pictures_that_were_encoded_are_never_overwritten(vae, tmp_path, name):
    made = written(tmp_path, vae, units=[("32x32", ["b.png", name])])
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / name).write_bytes(b"original")
    with pytest.raises(UserError, match=rf"images/{name} exists already: choose another --out"):
        decode_store(made.folder, tmp_path / "images", vae=vae, progress=False)
    assert [path.read_bytes() for path in (tmp_path / "images").iterdir()] == [b"original"]
    assert decode_store(made.folder, tmp_path / "images", vae=vae, limit=1, progress=False).num_images == 1


def test_a_model_in_training_stays_so_and_one_in_bfloat16_decodes_in_float32(tmp_path):
    vae = tiny_vae().bfloat16().train()
    made = written(tmp_path, vae, dtype="bf16")
    decode_store(made.folder, tmp_path / "out", vae=vae, limit=3, progress=False)
    assert vae.training and vae.decoder.conv_out.bias.dtype == torch.bfloat16


def test_gray_16_bit_pictures(tmp_path):
    vae = tiny_vae(channels=1)
    pixels = {"channels": 1, "dtype": "uint16", "range": [0, 65535]}
    made = written(tmp_path, vae, units=[("32x32", ["a.png"])], fields={"pixels": pixels})
    decode_store(made.folder, tmp_path / "out", vae=vae, progress=False)
    picture = Image.open(tmp_path / "out" / "a.png")
    assert picture.mode == "I;16" and len(np.unique(np.asarray(picture))) > 256


def test_a_store_of_samples_is_decoded_as_far_as_it_is(vae, tmp_path):
    made = written(tmp_path, vae, store="sample", complete=False, leave_out=[0])
    report = decode_store(made.folder, tmp_path / "out", vae=vae, progress=False)
    assert report.num_images == len(made.tensors) == 13


def test_picture_names_stay_apart_and_inside():
    assert picture_names(["a/b.jpg", "a/c.d.webp"]) == ["a/b.png", "a/c.d.png"]
    assert picture_names(["a.jpg", "a.png"]) == ["a.jpg.png", "a.png.png"]
    assert picture_names(["../../a.jpg", "/b.jpg", "C:/c.jpg"]) == ["a.png", "b.png", "C_/c.png"]
    assert picture_names(["..\\..\\a.jpg", 'b?"\0\n.jpg']) == [".._.._a.png", "b____.png"]
    assert picture_names(["a.png/b.jpg", "a.jpg"]) == ["a.png/b.jpg.png", "a.jpg.png"]  # no file where a folder is
    assert len({name.lower() for name in picture_names(["a.jpg", "A.jpg", "../a.jpg", "_/a.jpg"])}) == 4
