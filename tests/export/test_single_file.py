"""Models as one file in the LDM layout, alone or inside a whole checkpoint: proven by reading them back."""

import re

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentvae import cli
from latentvae.checkpoint import load_model, model_hashes, save_model
from latentvae.convert import convert_model
from latentvae.errors import UserError
from latentvae.export import ExportError, export_model, export_single_file, single_file
from latentvae.export.loaders import comfyui_obstacle, scaling_warning
from latentvae.export.proof import DTYPES
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.model.presets import PRESETS
from tests.model.ldm import ldm_weights
from tests.model.pairs import enliven, noise_images, relative

# As single files mean it: 32 groups; 4 resolutions, as the families have them.
CONFIG = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [32, 64, 64, 64],
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}
NO_QUANT = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
# A name in the other parts of a whole checkpoint, the prefix of its autoencoder, and what makes that one.
WHOLE = {
    "sd1": ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "first_stage_model.", {}),
    "sdxl": ("conditioner.embedders.0.transformer.text_model.final_layer_norm.bias", "first_stage_model.", {}),
    "flux1": ("model.diffusion_model.double_blocks.0.img_attn.proj.bias", "vae.", NO_QUANT),
}
METADATA = {"format": "pt", "modelspec.title": "mine", "modelspec.hash_sha256": "0xabc"}


def make_vae(changes=None, seed=0):
    return enliven(AutoencoderKL(**CONFIG | (changes or {})), seed).eval()


def whole_checkpoint(path, vae, family, *, rest=torch.float16):
    mark, prefix, _ = WHOLE[family]
    generator = torch.Generator().manual_seed(5)
    others = {
        mark: torch.randn(7, generator=generator).to(rest),
        "model.diffusion_model.out.2.weight": torch.randn(4, 8, 3, 3, generator=generator).to(rest),
        "model_ema.decay": torch.tensor(0.9999),
        "first_stage_model.loss.logvar": torch.zeros(()),
        "betas": torch.linspace(0, 1, 5, dtype=torch.float64),
    }
    save_file(ldm_weights(vae, prefix) | others, path, metadata=METADATA)
    return path


def assert_same_tensors(file, expected):
    found = load_file(file)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# --- alone -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("changes", [{}, NO_QUANT | {"mid_block_add_attention": False, "in_channels": 1}])
def test_an_ldm_file_converts_and_comes_back_bit_for_bit(tmp_path, dtype, changes):
    original = ldm_weights(make_vae(changes).to(DTYPES[dtype]))
    save_file(original, tmp_path / "vae.safetensors")
    convert_model(tmp_path / "vae.safetensors", tmp_path / "folder", scaling_factor=0.5)
    report = export_single_file(tmp_path / "folder", tmp_path / "back.safetensors", any_shape=True)
    assert_same_tensors(tmp_path / "back.safetensors", original)
    assert report.dtype == dtype and report.num_tensors == len(original)
    assert report.num_bytes == (tmp_path / "back.safetensors").stat().st_size
    assert report.rounding_difference == 0 and report.moments_difference <= 1e-5


def test_what_is_written_loads_in_plain_diffusers_and_here(tmp_path):
    vae = make_vae()
    save_model(vae, tmp_path / "model")
    export_single_file(vae, tmp_path / "vae.safetensors", any_shape=True)
    plain = diffusers.AutoencoderKL.from_single_file(
        str(tmp_path / "vae.safetensors"), config=str(tmp_path / "model"), local_files_only=True
    )
    images = noise_images(1, 3, 32, 32)
    with torch.no_grad():
        assert relative(plain(images).sample, vae(images).sample) <= 1e-5
    convert_model(tmp_path / "vae.safetensors", tmp_path / "converted", arch="sd1")
    assert model_hashes(load_model(tmp_path / "converted")) == model_hashes(vae)
    with safe_open(tmp_path / "vae.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "model", "vae.safetensors"]


def test_the_wanted_precision(tmp_path):
    vae = make_vae()
    before = model_hashes(vae)
    report = export_single_file(vae, tmp_path / "half.safetensors", dtype="fp16", any_shape=True)
    assert_same_tensors(tmp_path / "half.safetensors", {n: t.half() for n, t in ldm_weights(vae).items()})
    assert report.dtype == "fp16" and report.rounding_difference > 0
    assert vae.dtype == torch.float32 and model_hashes(vae) == before
    export_model(vae, tmp_path / "bf16", dtype="bf16")
    assert export_single_file(tmp_path / "bf16", tmp_path / "b.safetensors", any_shape=True).dtype == "bf16"
    assert export_single_file(vae.half(), tmp_path / "h.safetensors", any_shape=True).dtype == "fp16"


def test_other_groups_are_written_for_loaders_that_are_told(tmp_path):
    vae = make_vae({"norm_num_groups": 8})
    report = export_single_file(vae, tmp_path / "vae.safetensors", any_shape=True)
    assert "config.json beside it" in report.notes[0]
    vae.save_config(tmp_path)
    assert model_hashes(load_model(tmp_path / "vae.safetensors")) == model_hashes(vae)


# --- what ComfyUI builds ---------------------------------------------------------------------------------------------


def test_what_comfyui_builds():
    for name in ("f8c4", "f8c16", "f4c3"):
        assert comfyui_obstacle(PRESETS[name]) is None
    for changes, reason in [
        (PRESETS["f8c4-small"], "block_out_channels is 32, 64, 128, 128, and it builds 128, 256, 512, 512 or"),
        (PRESETS["f16c16"], "block_out_channels is 128, 128, 256, 256, 512, and"),
        ({"layers_per_block": 3}, "layers_per_block is 3, and it builds 2"),
        ({"norm_num_groups": 16}, "norm_num_groups is 16, and it builds 32"),
        ({"in_channels": 1}, "in_channels is 1"),
        ({"out_channels": 4}, "out_channels is 4"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention is False, and it builds True"),
        ({"use_quant_conv": False}, "only one of quant_conv"),
        ({"use_post_quant_conv": False}, "only one of quant_conv"),
        ({"latent_channels": 64}, "HunyuanImage"),
    ]:
        assert reason in comfyui_obstacle(PRESETS["f8c4"] | changes)


def test_a_model_that_comfyui_builds_is_written_without_asking(tmp_path):
    torch.manual_seed(0)
    report = export_single_file(AutoencoderKL.from_preset("f4c3"), tmp_path / "vae.safetensors", dtype="fp16")
    with safe_open(tmp_path / "vae.safetensors", framework="pt") as file:  # how ComfyUI tells f4 from f8
        names = set(file.keys())
        assert file.get_slice("decoder.conv_in.weight").get_shape() == [512, 3, 3, 3]
    assert "encoder.down.2.downsample.conv.weight" not in names and "decoder.up.3.upsample.conv.weight" not in names
    assert {"encoder.down.1.downsample.conv.weight", "post_quant_conv.weight"} <= names and report.notes == ()


def refused(message, *args, **kwargs):
    with pytest.raises(UserError, match=message) as caught:
        export_single_file(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_shapes_that_no_loader_reads_are_refused(tmp_path):
    out = tmp_path / "vae.safetensors"
    refused(r"ComfyUI cannot build .*: block_out_channels is 32, .*--any-shape", make_vae(), out)
    attention = {"down_block_types": [*CONFIG["down_block_types"][:3], "AttnDownEncoderBlock2D"]}
    refused("attention in its stages .*AttnDownEncoderBlock2D", make_vae(attention), out, any_shape=True)
    assert not list(tmp_path.iterdir())


# --- scaling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, r"scaling_factor 0.18215, which is sd1's: .* wrong beside sdxl \(scaling_factor 0.13025\)"),
        ({"scaling_factor": 0.13025}, "which is sdxl's"),
        ({"scaling_factor": 0.5}, r"that of sd1 .0.18215|scaled WRONGLY"),
        ({"shift_factor": 0.1}, "WRONGLY"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "per-channel latents_mean and latents_std.*WRONGLY"),
        (NO_QUANT | {"scaling_factor": 0.3611, "shift_factor": 0.1159}, "which is flux1's.*wrong beside sd3"),
        (NO_QUANT | {"scaling_factor": 0.3611}, "WRONGLY"),
        ({"latent_channels": 5}, "no released family has latents of its form"),
        ({"block_out_channels": [32, 64, 64]}, "no released family"),  # four channels, but f4
    ],
)
def test_a_single_file_carries_no_scaling(changes, message):
    assert re.search(message, scaling_warning(PRESETS["f8c4"] | CONFIG | changes))


# --- inside a whole checkpoint ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", WHOLE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_vae_of_a_whole_checkpoint_goes_out_and_back_in(tmp_path, family, dtype):
    changes = WHOLE[family][2]
    whole = whole_checkpoint(tmp_path / "whole.safetensors", make_vae(changes).to(DTYPES[dtype]), family)
    convert_model(whole, tmp_path / "folder")
    out = tmp_path / "back.safetensors"
    report = export_single_file(tmp_path / "folder", out, into=whole)
    assert out.read_bytes() == whole.read_bytes()
    assert report.warnings == () and report.dtype == dtype
    assert report.notes == ("its metadata is as it was, and modelspec.hash_sha256 is of the old weights",)

    other = make_vae(changes | {"scaling_factor": 0.5}, seed=1)
    report = export_single_file(other, out, into=whole, overwrite=True)
    assert f"takes {family}'s" in report.warnings[0] and "scaling_factor 0.5" in report.warnings[0]
    prefix = WHOLE[family][1]
    new = {name: tensor.to(DTYPES[dtype]) for name, tensor in ldm_weights(other, prefix).items()}
    assert_same_tensors(out, load_file(whole) | new)
    with safe_open(out, framework="pt") as file:
        assert file.metadata() == METADATA
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.safetensors", "folder", "whole.safetensors"]


def test_the_precision_inside_a_checkpoint(tmp_path):
    """Of each tensor that is replaced, where none is asked for."""
    vae = make_vae()
    weights = ldm_weights(vae, "first_stage_model.")
    mixed = {name: tensor.half() if "decoder" in name else tensor for name, tensor in weights.items()}
    save_file(mixed | {"cond_stage_model.x": torch.ones(3).half()}, tmp_path / "mixed.safetensors")
    report = export_single_file(vae, tmp_path / "out.safetensors", into=tmp_path / "mixed.safetensors")
    assert report.dtype == "fp16, fp32"
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "mixed.safetensors").read_bytes()
    report = export_single_file(
        vae, tmp_path / "b.safetensors", into=tmp_path / "mixed.safetensors", dtype="bf16", overwrite=True
    )
    expected = {name: tensor.bfloat16() for name, tensor in weights.items()}
    assert_same_tensors(tmp_path / "b.safetensors", expected | {"cond_stage_model.x": torch.ones(3).half()})


@pytest.mark.parametrize(
    "change, changes, message",
    [
        (lambda w: w.pop("first_stage_model.quant_conv.bias"), {}, "has no first_stage_model.quant_conv.bias, which"),
        (
            lambda w: w.update({"first_stage_model.decoder.y": torch.zeros(1)}),
            {},
            "has first_stage_model.decoder.y",
        ),
        (
            lambda w: None,
            {"latent_channels": 8},
            "encoder.conv_out.weight is 8x64x3x3 there and 16x64x3x3 in",
        ),
        (lambda w: None, {"norm_num_groups": 16}, "norm_num_groups 16, and the autoencoder of a checkpoint has 32"),
        (lambda w: w.update({k: t.double() for k, t in w.items()}), {}, "is of type F64: pass --dtype"),
        (lambda w: [w.pop(k) for k in list(w) if "first" in k] and w.update(x=torch.ones(1)), {}, "no autoencoder"),
    ],
)
def test_a_checkpoint_with_another_autoencoder(tmp_path, change, changes, message):
    weights = ldm_weights(make_vae(), "first_stage_model.")
    change(weights)
    save_file(weights, tmp_path / "whole.safetensors")
    refused(message, make_vae(changes), tmp_path / "out.safetensors", into=tmp_path / "whole.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


# --- mistakes, and proofs that fail ----------------------------------------------------------------------------------


def test_mistakes(tmp_path):
    vae = make_vae()
    whole = whole_checkpoint(tmp_path / "whole.safetensors", vae, "sd1")
    before = whole.read_bytes()
    out = tmp_path / "out.safetensors"
    refused("never changed in place", vae, whole, into=whole, overwrite=True)
    (tmp_path / "link.safetensors").hardlink_to(whole)
    refused("never changed in place", vae, tmp_path / "link.safetensors", into=whole, overwrite=True)
    refused("never changed in place", whole, whole, overwrite=True, any_shape=True)
    refused("ends in .safetensors", vae, tmp_path / "out.ckpt", any_shape=True)
    refused("dtype 'int8' is not known", vae, out, dtype="int8")
    refused("no model at", tmp_path / "absent", out)
    refused("there is no checkpoint file", vae, out, into=tmp_path / "absent.safetensors")
    torch.save({}, tmp_path / "whole.ckpt")
    refused("is a pickle.*give it as .safetensors", vae, out, into=tmp_path / "whole.ckpt")
    (tmp_path / "cut.safetensors").write_bytes(before[:-5])
    refused("cut.safetensors cannot be read as safetensors", vae, out, into=tmp_path / "cut.safetensors")
    (tmp_path / "file").touch()
    refused("cannot write", vae, tmp_path / "file" / "out.safetensors", any_shape=True)
    (tmp_path / "folder.safetensors").mkdir()
    refused("is a folder", vae, tmp_path / "folder.safetensors", any_shape=True, overwrite=True)
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] = 7e4
    refused("decoder.conv_out.bias reaches 70000 and fp16 ends", vae, out, dtype="fp16", any_shape=True)
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] = float("nan")
    refused("decoder.conv_out.bias has values that are not finite", vae, out, any_shape=True)
    assert not out.exists() and whole.read_bytes() == before
    out.touch()
    refused("exists already", make_vae(), out, any_shape=True)
    export_single_file(make_vae(), out, any_shape=True, overwrite=True)


def test_a_file_that_does_not_reproduce_the_model_is_not_left_behind(tmp_path, monkeypatch):
    out = tmp_path / "out.safetensors"
    vae = make_vae()
    exchanged = single_file.ldm_tensors

    def swapped(weights, num_levels):
        names = exchanged(weights, num_levels)
        query, key = (f"decoder.mid.attn_1.{name}.weight" for name in "qk")
        names[query], names[key] = names[key], names[query]
        return names

    monkeypatch.setattr(single_file, "ldm_tensors", swapped)
    with pytest.raises(ExportError, match=r"plain diffusers reads other values of decoder\.mid_block\.attentions"):
        export_single_file(vae, out, any_shape=True)
    monkeypatch.undo()

    def flipped(tensors, path, metadata):
        save_file(tensors, path, metadata)
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(single_file, "save_file", flipped)
    with pytest.raises(ExportError, match="came back with other values"):
        export_single_file(vae, out, any_shape=True)
    monkeypatch.undo()

    def other_outputs(*args, **kwargs):
        plain = load(*args, **kwargs)
        plain.decoder.conv_act = torch.nn.GELU()
        return plain

    load = diffusers.AutoencoderKL.from_single_file
    monkeypatch.setattr(diffusers.AutoencoderKL, "from_single_file", other_outputs)
    with pytest.raises(ExportError, match="plain diffusers gives other outputs"):
        export_single_file(vae, out, any_shape=True)
    monkeypatch.undo()

    whole = whole_checkpoint(tmp_path / "whole.safetensors", vae, "sd1")

    def damaged(source, tensors, path):
        write(source, tensors, path)
        content = bytearray(path.read_bytes())
        content[source.tensors["betas"].start] ^= 1
        path.write_bytes(content)

    write = single_file.write_exchanged
    monkeypatch.setattr(single_file, "write_exchanged", damaged)
    with pytest.raises(ExportError, match="betas came back other than"):
        export_single_file(vae, out, into=whole)
    assert [path.name for path in tmp_path.iterdir()] == ["whole.safetensors"]


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys):
    """Run `latentvae export`; returns (exit code, what it printed, its error line)."""

    def _run(*arguments):
        try:
            cli.main(["export", *(str(argument) for argument in arguments)])
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err.strip().removeprefix("error: ")

    return _run


def test_the_command(run, tmp_path):
    vae = make_vae({"scaling_factor": 0.5})
    model, out = save_model(vae, tmp_path / "model"), tmp_path / "vae.safetensors"
    code, _, error = run(model, "--out", out, "--format", "ldm")
    assert code == 2 and "ComfyUI cannot build" in error and "\n" not in error
    code, printed, _ = run(model, "--out", out, "--format", "ldm", "--any-shape", "--dtype", "fp16")
    assert code == 0 and "in fp16" in printed and "WARNING: a single file carries no latent scaling" in printed
    assert "note: ComfyUI cannot build it" in printed
    whole = whole_checkpoint(tmp_path / "whole.safetensors", vae, "sdxl")
    new = tmp_path / "new.safetensors"
    code, printed, _ = run(model, "--out", new, "--format", "ldm", "--into", whole)
    assert code == 0 and "takes sdxl's, scaling_factor 0.13025" in printed
    assert new.read_bytes() == whole.read_bytes()
    for arguments, message in [
        (["--out", new, "--format", "ldm", "--into", whole], "exists already"),
        (["--out", tmp_path / "x", "--format", "ldm"], "ends in .safetensors"),
        (["--out", tmp_path / "x.safetensors"], "is the name of a file: add --format ldm"),
        (["--out", tmp_path / "x", "--into", whole], "--into is for --format ldm"),
        (["--out", tmp_path / "x", "--any-shape"], "--any-shape is for --format ldm"),
        (["--out", tmp_path / "x.safetensors", "--format", "ldm", "--push-to-hub", "a/b"], "--push-to-hub is for --fo"),
    ]:
        code, _, error = run(model, *arguments)
        assert code == 2 and message in error
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.safetensors").exists()


def test_a_run_stands_for_its_finished_model(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("model: {}\n")
    code, _, error = run(tmp_path / "run", "--out", tmp_path / "out")
    assert code == 2 and "is a run that has not finished: to do so, continue it" in error
    save_model(make_vae(seed=1), tmp_path / "run" / "best")
    code, _, error = run(tmp_path / "run", "--out", tmp_path / "out")
    assert code == 2 and f"export {tmp_path / 'run' / 'best'}, its best model so far" in error
    save_model(make_vae(), tmp_path / "run" / "model", files={"metrics.json": '{"psnr": 25.25}'})
    assert run(tmp_path / "run", "--out", tmp_path / "out")[0] == 0
    assert model_hashes(load_model(tmp_path / "out")) == model_hashes(make_vae())
    assert "| psnr | 25.25 |" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    code, _, _ = run(tmp_path / "run", "--out", tmp_path / "vae.safetensors", "--format", "ldm", "--any-shape")
    assert code == 0
