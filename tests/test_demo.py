"""The demo from end to end, with so little training that only the chain is tested, not the quality."""

import importlib.metadata
import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from latentvae import demo
from latentvae.errors import UserError
from latentvae.latents.reading.dataset import LatentDataset

SHORT = (
    "training.total_images=16",
    "training.global_batch_size=8",
    "data.num_workers=0",
    "data.resolution=32",
    "validation.max_images=4",
    "validation.resolution=32",
)


@pytest.fixture
def small(monkeypatch):
    """Pictures of 64 pixels instead of 256."""
    monkeypatch.setattr(demo, "RESOLUTION", 64)


def check(out, result, num_images):
    """Everything that the demo promises is there and fits together."""
    vae = diffusers.AutoencoderKL.from_pretrained(out / "model")
    dataset = LatentDataset(out / "store")
    assert len(dataset) == num_images
    assert type(vae) is diffusers.AutoencoderKL
    with torch.no_grad():
        decoded = vae.decode(dataset.scaling.denormalize(dataset[0]["latents"].float()[None])).sample
    assert decoded.shape == (1, 3, 64, 64)
    assert len(list((out / "decoded").rglob("*.png"))) == num_images
    picture = np.asarray(Image.open(out / "reconstructions.png"))
    assert picture.shape[0] > 2 * 64
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["psnr"] == result.psnr
    assert result.images_seen == 16
    assert result.compression_ratio == pytest.approx(64 * 64 * 3 / (4 * 8 * 8 * 2))
    assert 5 < result.psnr_mean_colour < 40


def test_own_images(tmp_path, photographs, small, capsys):
    out = tmp_path / "demo"
    result = demo.run_demo(out, images=photographs, overrides=SHORT)
    shown = [path for path in (out / "photographs").rglob("*") if path.is_file()]
    check(out, result, len(shown))
    printed = capsys.readouterr().out
    assert "reconstructions.png" in printed
    assert "latentvae encode" in printed


@pytest.mark.slow
def test_photographs_of_scikit_image(tmp_path, small):
    pytest.importorskip("skimage")
    out = tmp_path / "demo"
    result = demo.run_demo(out, overrides=SHORT)
    check(out, result, len(demo.TRAINED_PHOTOGRAPHS) + len(demo.HELD_OUT_PHOTOGRAPHS))
    assert result.psnr_held_out is not None


def test_scikit_image_ships_the_photographs():
    """In its wheel: the others of its data sets are downloaded on demand."""
    pytest.importorskip("skimage")
    shipped = {path.name for path in importlib.metadata.files("scikit-image") or [] if path.parent.name == "data"}
    assert {*demo.TRAINED_PHOTOGRAPHS, *demo.HELD_OUT_PHOTOGRAPHS} <= shipped


def test_an_existing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="exists already"):
        demo.run_demo(tmp_path)


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        demo.run_demo(tmp_path / "out", images=tmp_path / "empty")
    assert not (tmp_path / "out").exists()


def test_mean_colour_is_the_baseline():
    """A picture of two equal halves, 0 and 200: its mean colour is 100 away everywhere, 20 log10(255 / 100) dB."""
    image = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    image[:, :2] = 200
    mean = image.double().mean((1, 2), keepdim=True).expand(image.shape)
    assert demo.psnr(image, mean).item() == pytest.approx(20 * np.log10(255 / 100))
