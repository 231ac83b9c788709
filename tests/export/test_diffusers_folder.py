"""Exported folders are proven by plain diffusers before they exist."""

import re

import diffusers
import numpy as np
import pytest
import torch

from latentvae.checkpoint import load_model, model_hashes, save_model
from latentvae.errors import UserError
from latentvae.export import DTYPES, ExportError, diffusers_folder, export_model
from latentvae.images import PixelFormat
from latentvae.model.autoencoder import AutoencoderKL


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    vae = AutoencoderKL.from_preset("f4c3-tiny").eval()
    vae.register_to_config(scaling_factor=0.75)
    return vae


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_loads_in_plain_diffusers(vae, tmp_path, dtype):
    source = save_model(vae, tmp_path / "model")
    report = export_model(source, tmp_path / "out", dtype=dtype)
    plain = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out", torch_dtype=DTYPES[dtype])
    assert plain.config.scaling_factor == 0.75
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, vae.state_dict()[name].to(DTYPES[dtype]))
    assert report.moments_difference <= 1e-5 and report.reconstruction_difference <= 1e-5
    assert (report.rounding_difference > 0) == (dtype != "fp32")
    assert report.num_parameters == sum(parameter.numel() for parameter in vae.parameters())
    assert report.num_bytes == pytest.approx(report.num_parameters * DTYPES[dtype].itemsize, rel=0.02)
    assert report.hashes == model_hashes(load_model(tmp_path / "out", torch_dtype=DTYPES[dtype]))
    assert report.folder == tmp_path / "out"


def test_what_is_switched_on_in_the_given_model_is_no_part_of_it(tmp_path):
    vae = AutoencoderKL.from_preset("f4c3-tiny", sample_size=16)
    vae.enable_gradient_checkpointing()
    vae.enable_tiling()  # the check has several tiles of 16 pixels
    export_model(vae, tmp_path / "tiled")
    vae.enable_layerwise_casting(torch.float16, torch.float32)
    report = export_model(vae, tmp_path / "cast")
    assert report.hashes == model_hashes(load_model(tmp_path / "cast"))
    export_model(tmp_path / "cast", tmp_path / "again")
    assert str(tmp_path) not in (tmp_path / "again" / "config.json").read_text()  # nobody's business on the hub


def test_the_given_model_stays_as_it_is(vae, tmp_path):
    before = model_hashes(vae)
    vae.train()
    export_model(vae, tmp_path / "out", dtype="fp16")
    assert vae.training and vae.dtype == torch.float32 and model_hashes(vae) == before
    vae.eval()


def test_model_card(vae, tmp_path):
    export_model(vae, tmp_path / "out", dtype="bf16", metrics={"psnr": 25.25, "lpips": 0.125})
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: diffusers\n")
    for expected in ("| psnr | 25.25 |", "| lpips | 0.125 |", "| scaling_factor | 0.75 |", "torch.bfloat16", "4 x 4"):
        assert expected in card
    # The snippet of the card runs as it stands.
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace("PATH_OR_HUB_ID", str(tmp_path / "out"))
    names = {"images": torch.zeros(1, 3, 16, 16, dtype=torch.bfloat16)}
    exec(snippet, names)
    assert names["reconstructions"].shape == (1, 3, 16, 16)


def test_real_images_of_any_size_and_format(vae, tmp_path):
    generator = np.random.default_rng(0)
    report = export_model(vae, tmp_path / "rgb", images=generator.integers(0, 256, (19, 30, 3), dtype=np.uint8))
    assert report.checked_on == "1 given image(s) of 28x16"
    gray = AutoencoderKL.from_preset("f4c3-tiny", in_channels=1, out_channels=1)
    images = generator.integers(0, 65536, (2, 16, 16, 1), dtype=np.uint16)
    report = export_model(gray, tmp_path / "gray", images=images, pixels=PixelFormat(channels=1, dtype="uint16"))
    assert report.checked_on == "2 given image(s) of 16x16"
    with pytest.raises(UserError, match="at least 4x4"):
        export_model(vae, tmp_path / "small", images=np.zeros((2, 9, 3), np.uint8))
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize(
    "fields, formula",
    [
        ({"shift_factor": None}, "raw * scaling_factor"),
        ({"shift_factor": 0.25}, "(raw - shift_factor) * scaling_factor"),
        (
            {"latents_mean": [1.0] * 16, "latents_std": [2.0] * 16},
            "(raw - latents_mean) * scaling_factor / latents_std",
        ),
    ],
)
def test_scaling_families(tmp_path, fields, formula):
    vae = AutoencoderKL.from_preset("f8c16-tiny", scaling_factor=0.5, **fields)
    export_model(vae, tmp_path / "out")
    config = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out").config
    assert {name: config[name] for name in fields} == fields
    assert f"`normalized = {formula}`" in (tmp_path / "out" / "README.md").read_text()


def refused(message, *args, **kwargs):
    with pytest.raises(UserError, match=message) as caught:
        export_model(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_values_that_the_dtype_cannot_hold(tmp_path):
    vae = AutoencoderKL.from_preset("f4c3-tiny")
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] = 7e4
        refused("decoder.conv_out.bias reaches 70000 and fp16 ends at 65504", vae, tmp_path / "out", dtype="fp16")
        vae.decoder.conv_out.bias[0] = float("nan")
        refused("decoder.conv_out.bias has values that are not finite", vae, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_refusals(vae, tmp_path):
    refused("no model at", tmp_path / "absent", tmp_path / "out")
    refused("dtype 'int8' is not known", vae, tmp_path / "out", dtype="int8")
    (tmp_path / "out").mkdir()
    refused("exists already", vae, tmp_path / "out")
    (tmp_path / "file").touch()
    refused("cannot write the model to", vae, tmp_path / "file" / "out")
    export_model(vae, tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("what", ["weights", "config", "outputs", "flipped byte", "truncated file"])
def test_a_folder_that_does_not_reproduce_the_model_is_not_left_behind(vae, tmp_path, monkeypatch, what):
    load = diffusers.AutoencoderKL.from_pretrained

    def broken(folder, **kwargs):
        file = folder / "diffusion_pytorch_model.safetensors"
        written = bytearray(file.read_bytes())
        if what == "flipped byte":
            written[-100] ^= 1
        elif what == "truncated file":
            del written[-100:]
        file.write_bytes(written)
        plain = load(folder, **kwargs)
        if what == "weights":
            plain.decoder.conv_out.bias.data[0] += 1e-3
        elif what == "config":
            plain.register_to_config(scaling_factor=0.7)
        elif what == "outputs":
            plain.decoder.conv_act = torch.nn.GELU()
        return plain

    monkeypatch.setattr(diffusers_folder.diffusers.AutoencoderKL, "from_pretrained", broken)
    with pytest.raises(ExportError):
        export_model(vae, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_outputs_that_are_not_finite_prove_nothing(tmp_path):
    vae = AutoencoderKL.from_preset("f4c3-tiny")
    with torch.no_grad():
        vae.decoder.conv_out.weight.fill_(3e38)
    with pytest.raises(ExportError, match="nan"):
        export_model(vae, tmp_path / "out")


def test_push_to_hub_uploads_the_finished_folder(vae, tmp_path, monkeypatch):
    calls = []

    class Hub:
        def create_repo(self, repo_id, exist_ok):
            calls.append(repo_id)

        def upload_folder(self, repo_id, folder_path):
            calls.append((repo_id, sorted(file.name for file in folder_path.iterdir())))

    monkeypatch.setattr(diffusers_folder, "HfApi", Hub)
    export_model(vae, tmp_path / "out", push_to_hub="me/vae")
    assert calls == ["me/vae", ("me/vae", ["README.md", "config.json", "diffusion_pytorch_model.safetensors"])]


def test_push_to_hub_offline_keeps_the_folder(vae, tmp_path, monkeypatch):
    def unreachable(self, *args, **kwargs):
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(diffusers_folder.HfApi, "create_repo", unreachable)
    refused("is written, but not uploaded to me/vae: no route to host", vae, tmp_path / "out", push_to_hub="me/vae")
    assert load_model(tmp_path / "out")
