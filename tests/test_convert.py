"""Weight files of other tools into diffusers folders: round trips, families, pickles, tiny autoencoders."""

import functools
import os
import pickle
import random

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import latentvae.convert
from latentvae import cli
from latentvae.autoencoders.adapter import load_autoencoder
from latentvae.checkpoint import load_model, model_hashes
from latentvae.convert import ConvertError, convert_model
from latentvae.errors import UserError
from latentvae.images import PixelFormat, from_model, to_model
from latentvae.model.autoencoder import AutoencoderKL
from tests.autoencoders.test_tiny import make_halves
from tests.conftest import SHARED
from tests.model.ldm import ldm_weights
from tests.model.pairs import enliven, noise_images, relative

# LDM files have 32 groups in every norm.
CONFIG = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 32,
}
NO_QUANT = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
# What else lies in a whole checkpoint of each family, and the scaling of its released model.
WHOLE = {
    "sd1": ("cond_stage_model.transformer.text_model.embeddings.position_ids", "first_stage_model.", {}, 0.18215, None),
    "sdxl": (
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
        "first_stage_model.",
        {},
        0.13025,
        None,
    ),
    "sd3": (
        "model.diffusion_model.joint_blocks.0.context_block.attn.proj.bias",
        "first_stage_model.",
        NO_QUANT,
        1.5305,
        0.0609,
    ),
    "flux1": ("model.diffusion_model.double_blocks.0.img_attn.proj.bias", "vae.", NO_QUANT, 0.3611, 0.1159),
}
TAEF2 = SHARED.parent / "weights" / "taef2"


def make_vae(changes=None, seed=0):
    return enliven(AutoencoderKL(**CONFIG | (changes or {})), seed).eval()


def write(path, weights):
    """A weight file of the kind that its suffix says; .ckpt as training code writes it."""
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({"state_dict": weights, "global_step": 7} if path.suffix == ".ckpt" else weights, path)
    return path


def assert_same(folder, vae):
    """Plain diffusers reads exactly the weights of `vae` there, and computes the same."""
    plain = diffusers.AutoencoderKL.from_pretrained(folder)
    expected = vae.state_dict()
    assert plain.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in plain.state_dict().items())
    images = noise_images(1, 3, 16, 16)
    with torch.no_grad():
        assert relative(plain(images).sample, vae(images).sample) <= 1e-5
    return plain


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt", ".pth", ".bin"])
def test_an_ldm_file_comes_back_whole(tmp_path, suffix):
    vae = make_vae()
    file = write(tmp_path / f"vae{suffix}", ldm_weights(vae))
    report = convert_model(file, tmp_path / "out", arch="sdxl")
    plain = assert_same(tmp_path / "out", vae)
    assert plain.config.scaling_factor == report.scaling_factor == 0.13025 and report.shift_factor is None
    assert (report.class_name, report.dtype) == ("AutoencoderKL", "float32") and 0 <= report.difference <= 1e-5
    assert report.num_parameters == sum(parameter.numel() for parameter in vae.parameters())
    assert any("sdxl's, not read from the file" in note for note in report.notes)
    assert model_hashes(load_model(tmp_path / "out")).encoder == model_hashes(vae).encoder
    assert not list((tmp_path / "out").glob("*.bin"))


@pytest.mark.parametrize("family", WHOLE)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_the_autoencoder_of_a_whole_checkpoint(tmp_path, family, suffix):
    mark, prefix, changes, scaling_factor, shift_factor = WHOLE[family]
    vae = make_vae(changes)
    weights = ldm_weights(vae, prefix) | {mark: torch.zeros(3), "model.diffusion_model.out.weight": torch.zeros(2)}
    file = write(tmp_path / f"whole{suffix}", weights)
    report = convert_model(file, tmp_path / "out")
    config = assert_same(tmp_path / "out", vae).config
    assert (config.scaling_factor, config.shift_factor) == (scaling_factor, shift_factor)
    assert any(f"recognised as {family}" in note for note in report.notes)
    if suffix == ".safetensors":  # read where it lies, the same
        loaded = load_model(file)
        assert (loaded.config.scaling_factor, loaded.config.shift_factor) == (scaling_factor, shift_factor)
        assert model_hashes(loaded) == model_hashes(load_model(tmp_path / "out"))


@pytest.mark.parametrize("changes, families", [({}, "sd1 .* sdxl"), (NO_QUANT, "sd3 .* flux1")])
def test_a_family_that_the_file_does_not_tell_is_asked_for(tmp_path, changes, families):
    """Two families share a layout, and differ in a number that no tensor holds."""
    file = write(tmp_path / "vae.safetensors", ldm_weights(make_vae(changes)))
    for read in (load_model, lambda path: convert_model(path, tmp_path / "out")):
        with pytest.raises(UserError, match=f"--arch {families} .*put the model's config.json beside it"):
            read(file)
    assert not (tmp_path / "out").exists()
    report = convert_model(file, tmp_path / "out", scaling_factor=0.5, shift_factor=0.25)
    assert (report.scaling_factor, report.shift_factor, report.notes) == (0.5, 0.25, ())
    wrong = "sd3" if not changes else "sd1"
    with pytest.raises(UserError, match=rf"is not of family {wrong}: .* looks like"):
        convert_model(file, tmp_path / "wrong", arch=wrong)


def test_another_architecture_is_read_from_the_tensors(tmp_path):
    """kl-f4 and the like: other depth, widths and channels, of no known family."""
    changes = {
        "block_out_channels": (32, 64, 96),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 2,
        "latent_channels": 3,
        "in_channels": 1,
        "out_channels": 1,
        "mid_block_add_attention": False,
    }
    vae = make_vae(changes)
    file = write(tmp_path / "kl.ckpt", ldm_weights(vae) | {"loss.discriminator.main.0.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"no known family.*--scaling-factor"):
        convert_model(file, tmp_path / "out")
    with pytest.raises(UserError, match="scaling_factor 0"):
        convert_model(file, tmp_path / "out", scaling_factor=0.0)
    convert_model(file, tmp_path / "out", scaling_factor=1.0)
    plain = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out")
    expected = vae.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in plain.state_dict().items())
    assert plain.config.in_channels == 1 and list(plain.config.block_out_channels) == [32, 64, 96]


def test_what_else_lies_in_a_file_is_told_and_left(tmp_path):
    """The loss and the average of LDM's training lie beside the weights, under other names."""
    weights = ldm_weights(make_vae())
    extra = {
        "loss.logvar": torch.zeros(()),
        "loss.discriminator.main.0.weight": torch.zeros(1),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.decoderconv_inbias": weights["decoder.conv_in.bias"] + 1,
    }
    for prefix in ("", "first_stage_model."):
        file = {prefix + name: tensor for name, tensor in (weights | extra).items()}
        report = convert_model(
            write(tmp_path / f"vae{prefix}.safetensors", file), tmp_path / f"out{prefix}", scaling_factor=0.5
        )
        assert report.notes == ("not of the autoencoder, and not read: loss (2), model_ema (2)",)
        assert_same(tmp_path / f"out{prefix}", make_vae())


def test_half_precision_stays(tmp_path):
    vae = make_vae().half()
    file = write(tmp_path / "vae.ckpt", ldm_weights(vae) | {"model.diffusion_model.x": torch.zeros(1)})
    assert convert_model(file, tmp_path / "out", arch="sd1").dtype == "float16"
    stored = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in vae.state_dict().items())


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda weights: weights.pop("decoder.up.0.block.1.conv2.bias"),
            r"lacks decoder.up.0.block.1.conv2.bias, of shape 32",
        ),
        (
            lambda weights: weights.pop("encoder.conv_in.weight"),
            "lacks weights of an .* none named encoder.conv_in.weight",
        ),
        (
            lambda weights: weights.pop("encoder.down.1.block.0.conv1.weight"),
            "none named encoder.down.1.block.0.conv1.weight",
        ),
        (lambda weights: weights.pop("quant_conv.weight"), "has quant_conv.bias, which"),
        (
            lambda weights: weights.pop("decoder.mid.attn_1.k.weight"),
            "lacks decoder.mid.attn_1.k.weight, of shape 64x64",
        ),
        (
            lambda weights: weights.update({"encoder.down.999999.block.999999.x": torch.zeros(1)}),
            "none named encoder.down.0.block.1.conv1",
        ),
        (
            lambda weights: weights.update({"encoder.conv_in.weight": torch.zeros(32, 3, 1, 3, 3)}),
            "encoder.conv_in.weight is of 5 dimensions",
        ),
        (lambda weights: weights.update({"encoder.down.1.attn.0.q.weight": torch.zeros(1)}), "attention in the stages"),
        (
            lambda weights: weights.update({"decoder.up.9.block.0.conv1.weight": torch.zeros(1)}),
            "has decoder.up.9.block.0.conv1.weight, which",
        ),
        (
            lambda weights: weights.update({"decoder.conv_in.bias": torch.zeros(9)}),
            "decoder.conv_in.bias is of shape 9, and 64 is",
        ),
        (lambda weights: weights.update({"bn.running_mean": torch.zeros(9)}), "FLUX.2"),
        (lambda weights: weights["decoder.conv_in.bias"].fill_(float("nan")), "decoder.conv_in.bias is not finite"),
        (lambda weights: weights.update({"quant_conv.bias": torch.ones(8, dtype=torch.int64)}), "is of torch.int64"),
    ],
)
def test_misfits_are_refused(tmp_path, change, message):
    weights = ldm_weights(make_vae())
    change(weights)
    with pytest.raises(UserError, match=message) as caught:
        convert_model(write(tmp_path / "vae.ckpt", weights), tmp_path / "out", arch="sd1")
    assert "\n" not in str(caught.value) and "vae.ckpt" in str(caught.value)
    assert not (tmp_path / "out").exists()


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
def test_a_malicious_pickle_is_refused_and_does_nothing(tmp_path, suffix):
    trap, file = str(tmp_path / "trap"), tmp_path / f"vae{suffix}"
    weights = ldm_weights(make_vae())
    for payload in ({**weights, "x": Malicious(trap)}, Malicious(trap)):
        for save, message in [
            (torch.save, r"asks for \w+\.mkdir, more than weights.*refused"),
            (functools.partial(torch.save, _use_new_zipfile_serialization=False), r"asks for \w+\.mkdir"),
            (lambda value, path: path.write_bytes(pickle.dumps(value, 2)), "asks for|damaged"),
        ]:
            save(payload, file)
            with pytest.raises(UserError, match=message) as caught:
                convert_model(file, tmp_path / "out", arch="sd1")
            assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    assert not os.path.exists(trap) and not (tmp_path / "out").exists()
    pickle.loads(pickle.dumps(Malicious(trap)))  # the trap is one
    assert os.path.exists(trap)


def test_damaged_files_are_one_line(tmp_path):
    weights = ldm_weights(make_vae())
    generator = random.Random(0)
    for suffix in (".ckpt", ".safetensors"):
        whole = write(tmp_path / f"whole{suffix}", weights).read_bytes()
        for number in range(20):
            content = bytearray(whole[: generator.randrange(len(whole))] if number % 2 else whole[:5000])
            for _ in range(3):
                if content:
                    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
            file = tmp_path / f"damaged{number}{suffix}"
            file.write_bytes(content)
            with pytest.raises(UserError) as caught:
                convert_model(file, tmp_path / "out", arch="sd1")
            assert "\n" not in str(caught.value)


def test_bad_arguments(tmp_path):
    vae = write(tmp_path / "vae.safetensors", ldm_weights(make_vae()))
    (tmp_path / "notes.txt").write_text("no weights")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for files, options, message in [
        ([], {}, "no file"),
        (tmp_path / "absent.ckpt", {}, "no file, and of the weight files"),
        ([vae, tmp_path / "absent.ckpt"], {}, "there is no file"),
        ([vae, vae], {"arch": "sd1"}, "only --arch taesd takes two"),
        (vae, {"arch": "sd9"}, "must be one of auto, sd1"),
        (vae, {"arch": "taesd"}, "not named by numbers"),
        (tmp_path / "notes.txt", {}, "no weight file"),
        (tmp_path / "list.pt", {}, "no tensors by name"),
        (write(tmp_path / "empty.safetensors", {}), {}, "holds no tensors"),
    ]:
        with pytest.raises(UserError, match=message):
            convert_model(files, tmp_path / "out", **options)
    with pytest.raises(UserError, match="exists already"):
        convert_model(vae, tmp_path / "mine", arch="sd1")
    with pytest.raises(UserError, match="neither a model folder nor an empty one"):
        convert_model(vae, tmp_path / "mine", arch="sd1", overwrite=True)
    convert_model(vae, tmp_path / "out", arch="sd1")
    assert convert_model(vae, tmp_path / "out", arch="sdxl", overwrite=True).scaling_factor == 0.13025
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_a_folder_that_is_not_what_was_read_is_not_left_behind(tmp_path, monkeypatch):
    """The check can fail: a weight that changes between reading and writing is noticed."""
    vae = write(tmp_path / "vae.safetensors", ldm_weights(make_vae()))
    plain = diffusers.AutoencoderKL.from_pretrained

    def altered(*args, **kwargs):
        model = plain(*args, **kwargs)
        with torch.no_grad():
            model.decoder.conv_out.bias[0] += 1e-3
        return model

    monkeypatch.setattr(latentvae.convert.diffusers.AutoencoderKL, "from_pretrained", altered)
    with pytest.raises(ConvertError, match="not those that were read"):
        convert_model(vae, tmp_path / "out", arch="sd1")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("arch", ["auto", "taesd"])
@torch.no_grad()
def test_a_tiny_autoencoder_in_two_files(tmp_path, pooled, arch):
    first, second = make_halves(pooled)
    files = [write(tmp_path / "taex_encoder.pth", first.state_dict())]
    files.append(write(tmp_path / "taex_decoder.safetensors", second.state_dict()))
    outs = []
    for number, given in enumerate([files, files[::-1], tmp_path, tmp_path / "taex", str(tmp_path / "taex_")]):
        outs.append(tmp_path / f"out{number}")
        report = convert_model(given, outs[-1], arch=arch)
    assert report.class_name == ("AutoencoderTinyPool" if pooled else "AutoencoderTiny")
    assert (report.scaling_factor, report.shift_factor) == (1.0, 0.0)
    assert len({load_autoencoder(out).encoder_hash + load_autoencoder(out).decoder_hash for out in outs}) == 1

    images = noise_images(1, 3, 32, 32)
    expected = second(first((images + 1) / 2))
    autoencoder = load_autoencoder(outs[0])
    assert relative((autoencoder.decode(autoencoder.moments(images)) + 1) / 2, expected) <= 1e-5
    if not pooled:
        plain = diffusers.AutoencoderTiny.from_pretrained(outs[0])
        assert relative((plain.decode(plain.encode(images).latents).sample + 1) / 2, expected) <= 1e-5

    stored = outs[0] / "diffusion_pytorch_model.safetensors"  # one file with the names of diffusers
    convert_model(stored, tmp_path / "again", arch=arch)
    assert load_file(stored).keys() == load_file(tmp_path / "again" / stored.name).keys()
    assert load_autoencoder(tmp_path / "again").decoder_hash == autoencoder.decoder_hash


def test_weights_of_zeros_are_weights(tmp_path):
    encoder, decoder = (module.state_dict() for module in make_halves())
    encoder = {name: torch.zeros_like(tensor) for name, tensor in encoder.items()}
    files = [write(tmp_path / "encoder.pth", encoder), write(tmp_path / "decoder.pth", decoder)]
    assert convert_model(files, tmp_path / "out").difference == 0


def test_tiny_files_that_are_no_pair(tmp_path):
    first, second = (module.state_dict() for module in make_halves())
    one, two = write(tmp_path / "a_encoder.pth", first), write(tmp_path / "a_decoder.pth", second)
    for files, options, message in [
        (one, {}, "one encoder and one decoder are needed, encoder given"),
        ([two, two], {}, "decoder and decoder given"),
        ([one, two], {"arch": "sd1"}, "--arch taesd"),
        ([one, two], {"scaling_factor": 2.0}, "normalized already"),
        ([write(tmp_path / "flat.pth", first | {"0.weight": torch.zeros(8)}), two], {}, "no kernel of a convolution"),
    ]:
        with pytest.raises(UserError, match=message):
            convert_model(files, tmp_path / "out", **options)
    write(tmp_path / "b_encoder.pth", first)
    with pytest.raises(UserError, match=r"\*encoder\* \(2: a_encoder.pth, b_encoder.pth\)"):
        convert_model(tmp_path, tmp_path / "out")
    convert_model(tmp_path / "a", tmp_path / "out")


def test_the_command(tmp_path, capsys):
    vae = write(tmp_path / "vae.safetensors", ldm_weights(make_vae()))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["convert", str(vae), "--out", str(tmp_path / "out"), "--arch", "sdxl"])
    assert not stopped.value.code
    printed = capsys.readouterr().out
    assert "AutoencoderKL, " in printed and "note: scaling_factor 0.13025 is sdxl's" in printed
    assert load_model(tmp_path / "out").config.scaling_factor == 0.13025
    with pytest.raises(SystemExit) as stopped:
        cli.main(["convert", str(vae), "--out", str(tmp_path / "other")])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and "--arch sd1 (0.18215) or --arch sdxl (0.13025)" in lines[0]


@torch.no_grad()
def test_the_published_taef2_reconstructs_photographs(tmp_path, shared_data, capsys):
    """Real weights and real photographs: 30.2 dB was measured for it elsewhere, on other photographs."""
    if not TAEF2.is_dir():
        pytest.skip(f"taef2 weights absent: {TAEF2}")
    report = convert_model(TAEF2, tmp_path / "taef2")
    assert report.class_name == "AutoencoderTinyPool" and report.dtype == "float16"
    autoencoder = load_autoencoder(tmp_path / "taef2")
    assert (autoencoder.latent_channels, autoencoder.downsample_factor) == (32, 8)
    pixels, psnr = PixelFormat(), []
    for path in sorted(shared_data("bsds_test").rglob("*.jpg"))[::10]:
        image = np.asarray(Image.open(path).convert("RGB"))
        top, left = (image.shape[0] - 256) // 2, (image.shape[1] - 256) // 2
        crop = torch.from_numpy(image[top : top + 256, left : left + 256].copy())[None]
        decoded = from_model(autoencoder.decode(autoencoder.moments(to_model(crop, pixels))), pixels)
        error = (decoded.double() - crop.double()).square().mean()
        psnr.append(float(10 * torch.log10(255**2 / error)))
    with capsys.disabled():
        print(f"\ntaef2 on {len(psnr)} centre crops of bsds_test: {np.mean(psnr):.2f} dB")
    assert np.mean(psnr) == pytest.approx(27.95, abs=0.05)  # and 28.36 over all 100
