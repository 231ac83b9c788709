"""LDM-layout single files: as diffusers loads them, and strictly."""

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from latentvae.checkpoint import load_model
from latentvae.errors import UserError
from latentvae.model.autoencoder import AutoencoderKL
from tests.model.ldm import ldm_weights
from tests.model.pairs import TINY, make_pair, noise_images, relative

# LDM files know attention in the middle only.
CONFIG = TINY | {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The configuration, and the same weights alone and inside a whole Stable Diffusion."""
    folder = tmp_path_factory.mktemp("ldm")
    ours, theirs = make_pair(CONFIG)
    ours.save_config(folder)
    save_file(ldm_weights(ours), folder / "vae.safetensors")
    whole = ldm_weights(ours, "first_stage_model.") | {"model.diffusion_model.out.0.weight": torch.zeros(3)}
    save_file(whole, folder / "whole.safetensors")
    theirs.save_pretrained(folder / "diffusers")
    return folder


@pytest.mark.parametrize("name", ["vae.safetensors", "whole.safetensors"])
@torch.no_grad()
def test_loads_as_diffusers_loads_it(folder, name):
    ours = AutoencoderKL.from_single_file(str(folder / name), config=str(folder))
    theirs = diffusers.AutoencoderKL.from_single_file(str(folder / name), config=str(folder))
    expected = diffusers.AutoencoderKL.from_pretrained(folder / "diffusers")
    images = noise_images(1, 3, 16, 16)
    assert type(ours) is AutoencoderKL and not ours.training
    for vae in (ours, theirs, load_model(folder / name)):  # load_model finds config.json beside the file
        assert relative(vae(images).sample, expected(images).sample) <= 1e-5
    half = load_model(folder / name, torch_dtype=torch.float16)
    assert half.dtype == torch.float16


def test_diffusers_layout_single_file(folder):
    vae = load_model(folder / "diffusers" / "diffusion_pytorch_model.safetensors")
    assert type(vae) is AutoencoderKL


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda weights: weights.pop("encoder.conv_in.weight"), "lacks"),
        (lambda weights: weights.pop("quant_conv.bias"), "lacks"),
        (lambda weights: weights.pop("decoder.mid.attn_1.q.weight"), "lacks"),
        (lambda weights: weights.update({"decoder.up.7.block.0.conv1.weight": torch.zeros(1)}), "does not fit"),
        (lambda weights: weights.update({"decoder.conv_in.weight": torch.zeros(2, 2, 3, 3)}), "cannot be loaded"),
    ],
)
def test_files_that_do_not_fit_are_refused(folder, tmp_path, change, message):
    weights = ldm_weights(make_pair(CONFIG)[0])
    change(weights)
    save_file(weights, tmp_path / "vae.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(UserError, match=message) as caught:
        load_model(tmp_path / "vae.safetensors")
    assert "\n" not in str(caught.value)


def test_no_autoencoder_and_pickles(tmp_path, folder):
    save_file({"model.weight": torch.zeros(1)}, tmp_path / "unet.safetensors")
    with pytest.raises(UserError, match="holds no autoencoder"):
        load_model(tmp_path / "unet.safetensors")
    torch.save({}, tmp_path / "vae.ckpt")
    for name in ("vae.ckpt", "vae.model", "vae"):  # diffusers unpickles whatever is not named .safetensors
        torch.save(ldm_weights(make_pair(CONFIG)[0]), tmp_path / name)
        with pytest.raises(UserError, match="may be a pickle"):
            AutoencoderKL.from_single_file(str(tmp_path / name), config=str(folder))


def test_a_missing_weight_is_not_made_up(folder):
    """Not even where as many others are too much, and memory may be used."""
    weights = ldm_weights(make_pair(CONFIG)[0])
    weights["encoder.surplus"] = weights.pop("quant_conv.bias")
    with pytest.raises(UserError, match="lacks weights"):
        AutoencoderKL.from_single_file(weights, config=str(folder), low_cpu_mem_usage=False)
