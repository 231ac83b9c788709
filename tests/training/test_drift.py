"""The starting model and the drift from it, against answers known beforehand."""

import json
import os
import subprocess
import sys

import pytest
import torch

from latentvae.checkpoint import load_model, save_model
from latentvae.data.pipeline import Batch
from latentvae.errors import UserError
from latentvae.evaluation.metrics import psnr
from latentvae.images import PixelFormat, from_model, to_model
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.training.config import LoRAConfig
from latentvae.training.drift import measure_drift
from latentvae.training.lora import adapter_state, add_lora
from latentvae.training.starting import StartingModel
from latentvae.training.trainable import select_trainable
from tests.model.pairs import TINY, enliven, noise_images

PIXELS = PixelFormat()
CPU = torch.device("cpu")
SCALED = TINY | {"scaling_factor": 0.5, "shift_factor": 0.25}


def make(config=TINY, dtype=torch.float32):
    return enliven(AutoencoderKL(**config)).to(dtype).eval()


def pictures(count=6, size=16, seed=0):
    """uint8 (count, size, size, 3)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, size, size, 3), generator=generator, dtype=torch.uint8)


def batches(images=None, size=2):
    images = pictures() if images is None else images
    for start in range(0, len(images), size):
        positions = list(range(start, min(start + size, len(images))))
        yield Batch(images[start : start + size], [str(position) for position in positions], positions)


@torch.no_grad()
def shift_latents(vae, delta):
    """Every posterior mean moves by exactly `delta` before rounding."""
    vae.quant_conv.bias[: vae.config.latent_channels] += delta


@torch.no_grad()
def disturb(vae, part, amount=0.05):
    generator = torch.Generator().manual_seed(7)
    for parameter in getattr(vae, part).parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * amount)


def measured(starting, vae, given=None, pixels=PIXELS):
    return measure_drift(starting, vae, batches() if given is None else given, pixels, CPU)


def test_nothing_changed_is_no_drift():
    vae = make()
    report = measured(StartingModel(vae), vae)
    assert report.num_images == 6 and report.is_bit_identical and report.has_equal_scaling
    assert report.latent_mse == report.latent_mse_normalized == report.max_difference == 0
    assert report.cosine == pytest.approx(1, abs=1e-12)
    assert report.psnr_old == report.psnr_new == report.psnr_old_decoder == report.psnr_new_decoder


def test_a_changed_decoder_leaves_bit_identical_latents():
    vae = make()
    starting = StartingModel(vae)
    disturb(vae, "decoder")
    report = measured(starting, vae)
    assert report.is_bit_identical and report.latent_mse == 0
    assert report.psnr_old == report.psnr_old_decoder != report.psnr_new == report.psnr_new_decoder
    assert "bit-identical, by their values and by the encoder's weights" in str(report)


def test_known_shift_of_all_latents():
    """Means moved by 0.125: MSE 1/64 raw, times scaling_factor squared normalized, largest difference 0.125."""
    vae = make(SCALED, torch.float64)
    starting = StartingModel(vae)
    shift_latents(vae, 0.125)
    report = measured(starting, vae)
    assert report.latent_mse == pytest.approx(1 / 64, rel=1e-12)
    assert report.latent_mse_normalized == pytest.approx(0.25 / 64, rel=1e-12)
    assert report.max_difference == pytest.approx(0.125, rel=1e-12)
    assert not report.is_bit_identical and not report.has_equal_latents and not report.has_equal_encoder
    images = to_model(pictures(), PIXELS).double()
    with torch.no_grad():
        old = starting.encode_mean(images)
    expected = torch.nn.functional.cosine_similarity(old.flatten(1), (old + 0.125).flatten(1)).mean().item()
    assert report.cosine == pytest.approx(expected, rel=1e-12) and report.cosine < 1


def test_channels_statistics_normalize():
    per_channel = {"latents_mean": [0.0] * 4, "latents_std": [1.0, 2.0, 4.0, 8.0], "scaling_factor": 1.0}
    vae = make(TINY | per_channel, torch.float64)
    starting = StartingModel(vae)
    shift_latents(vae, 1.0)
    expected = (1 + 1 / 4 + 1 / 16 + 1 / 64) / 4
    assert measured(starting, vae).latent_mse_normalized == pytest.approx(expected, rel=1e-12)


@torch.no_grad()
def test_crossed_psnr_is_that_of_the_pairs_by_hand():
    old, new = make(), make()
    starting = StartingModel(old)
    disturb(new, "encoder")
    disturb(new, "decoder")
    report = measured(starting, new, batches(size=6))
    images = to_model(pictures(), PIXELS)

    def decibel(encoder, decoder):
        restored = from_model(decoder.decode(encoder.encode(images).latent_dist.mean).sample, PIXELS)
        return psnr(pictures(), restored).mean().item()

    assert report.psnr_old == pytest.approx(decibel(old, old), rel=1e-6)
    assert report.psnr_new == pytest.approx(decibel(new, new), rel=1e-6)
    assert report.psnr_old_decoder == pytest.approx(decibel(new, old), rel=1e-6)
    assert report.psnr_new_decoder == pytest.approx(decibel(old, new), rel=1e-6)
    assert len({report.psnr_old, report.psnr_new, report.psnr_old_decoder, report.psnr_new_decoder}) == 4


def test_one_changed_weight_that_no_image_shows_is_told_by_the_hash():
    vae = make()
    with torch.no_grad():
        vae.encoder.conv_in.weight[0, 0, 0, 0] = 0.0
    starting = StartingModel(vae)
    with torch.no_grad():
        vae.encoder.conv_in.weight[0, 0, 0, 0] = -0.0
    report = measured(starting, vae)
    assert report.has_equal_latents and not report.has_equal_encoder and not report.is_bit_identical
    assert "but the encoder's weights differ" in str(report)


def test_one_last_bit_of_a_log_variance_counts():
    vae = make()
    starting = StartingModel(vae)
    with torch.no_grad():
        vae.quant_conv.bias[-1] += 1e-3
    report = measured(starting, vae)
    assert report.latent_mse == 0 and not report.has_equal_latents


def test_changed_scaling_is_told():
    vae = make(SCALED)
    starting = StartingModel(vae)
    vae.register_to_config(scaling_factor=0.51)
    report = measured(starting, vae)
    assert not report.has_equal_scaling and "scaling   changed" in str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bit_identity_is_a_matter_of_values_alone(tmp_path, dtype, layout):
    """The same weights, whether they train or not, read from a file or not, in either memory layout."""
    save_model(make(dtype=dtype), tmp_path / "model")
    vae = load_model(tmp_path / "model", torch_dtype=dtype).to(memory_format=layout)
    starting = StartingModel(load_model(tmp_path / "model", torch_dtype=dtype))
    report = measured(starting, vae)
    assert report.is_bit_identical and report.psnr_old == report.psnr_new


def test_an_adapter_is_measured_merged_and_stays():
    vae = make()
    starting = StartingModel(vae)
    add_lora(vae, LoRAConfig(rank=2), 0)
    report = measured(starting, vae)
    assert report.is_bit_identical and report.psnr_old == report.psnr_new
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.05)
    before = adapter_state(vae)
    report = measured(starting, vae)
    assert report.is_bit_identical and report.psnr_old != report.psnr_new
    assert all(torch.equal(before[name], tensor) for name, tensor in adapter_state(vae).items())


def test_measuring_leaves_both_models_as_they_were():
    vae = make().to(memory_format=torch.channels_last)
    select_trainable(vae, "decoder")
    starting = StartingModel(vae)
    disturb(vae, "decoder")
    states = [{name: tensor.clone() for name, tensor in model.state_dict().items()} for model in (starting, vae)]
    flags = [parameter.requires_grad for parameter in vae.parameters()]
    first, second = measured(starting, vae), measured(starting, vae)
    assert first == second
    for model, state in zip((starting, vae), states, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert flags == [parameter.requires_grad for parameter in vae.parameters()]


def test_the_order_and_size_of_batches_change_nothing():
    vae = make(dtype=torch.float64)
    starting = StartingModel(vae)
    disturb(vae, "encoder")
    images = pictures()
    one, two = measured(starting, vae, batches(images, 1)), measured(starting, vae, batches(images.flip(0), 1))
    assert one == two
    three = measured(starting, vae, batches(images, 4))
    assert three.latent_mse == pytest.approx(one.latent_mse, rel=1e-12) and three.num_images == 6


def test_other_pixel_formats_and_sizes():
    gray = PixelFormat(channels=1, dtype="uint16")
    vae = make(TINY | {"in_channels": 1, "out_channels": 1})
    starting = StartingModel(vae)
    disturb(vae, "decoder")
    images = torch.from_numpy(pictures()[..., :1].numpy().astype("uint16") * 257)
    wide = torch.cat([images, images], dim=2)  # 16 x 32
    given = [next(batches(images)), next(batches(wide))]
    report = measured(starting, vae, iter(given), gray)
    assert report.num_images == 4 and 0 < report.psnr_new < 40 and report.is_bit_identical


def test_the_report_is_json_and_plain_lines():
    vae = make()
    starting = StartingModel(vae)
    disturb(vae, "encoder", 0.01)
    report = measured(starting, vae)
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["is_bit_identical"] is False and values["latent_mse"] == report.latent_mse
    lines = str(report).splitlines()
    assert len(lines) == 5 and all(len(line) < 140 for line in lines)
    assert (
        f"{report.latent_mse:.3g} raw" in lines[1] and f"{report.psnr_new_decoder:.2f} dB with old latents" in lines[4]
    )


def test_an_exact_model_has_finite_figures():
    """A constant latent of 0 has no direction: figures stay numbers."""
    vae = make()
    with torch.no_grad():
        vae.quant_conv.weight.zero_()
        vae.quant_conv.bias.zero_()
    json.dumps(measured(StartingModel(vae), vae).to_dict(), allow_nan=False)


def test_no_readable_image_is_an_error():
    vae = make()
    nothing = Batch(torch.empty(0), [], [], [("a.png", "is cut off")])
    with pytest.raises(UserError, match=r"none of the 1 validation images is readable.*a\.png"):
        measured(StartingModel(vae), vae, iter([nothing]))


# The starting model


def test_means_are_those_of_the_start_whatever_happens_to_the_model():
    vae = make()
    images = noise_images(2, 3, 16, 16)
    starting = StartingModel(vae, anchor_device=CPU)
    with torch.no_grad():
        expected = vae.encode(images).latent_dist.mean
        disturb(vae, "encoder")
        disturb(vae, "quant_conv")
    means = starting(images)
    assert torch.equal(means, expected) and torch.equal(starting.encode_mean(images), expected)
    assert not means.requires_grad and means.shape == (2, 4, 8, 8)
    assert not any(parameter.requires_grad for parameter in starting.parameters())


def test_means_are_wide_under_autocast_and_equal_the_model_s():
    vae = make()
    starting = StartingModel(vae)
    images = noise_images(1, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        mean, moments = starting(images), vae.moments(images)
    assert mean.dtype == torch.float32 and torch.equal(mean, moments.float().chunk(2, 1)[0])


def test_the_copy_is_of_the_start_when_the_model_was_prepared_for_training():
    vae = make().train()
    vae.enable_gradient_checkpointing()
    select_trainable(vae, "decoder")
    starting = StartingModel(vae)
    assert vae.training and vae.decoder.gradient_checkpointing
    assert not starting._vae.decoder.gradient_checkpointing
    assert [parameter.requires_grad for parameter in vae.encoder.parameters()].count(True) == 0


def test_an_adapted_model_is_no_start():
    vae = make()
    add_lora(vae, LoRAConfig(rank=2), 0)
    with pytest.raises(UserError, match="carries an adapter"):
        StartingModel(vae)


def test_a_resume_needs_the_same_start():
    vae = make(SCALED)
    saved = json.loads(json.dumps(StartingModel(vae).to_dict()))
    StartingModel(make(SCALED)).require_same(saved, "start")
    changed = {}
    for part in ("encoder", "decoder"):
        other = make(SCALED)
        disturb(other, part, 1e-6)
        changed[part] = other
    changed["scaling"] = make(SCALED | {"scaling_factor": 0.6})
    changed["encoder and decoder"] = make(SCALED, torch.float64)
    for what, other in changed.items():
        with pytest.raises(UserError, match=rf"start_from path/to/vae is not what this run .*: its {what} changed"):
            StartingModel(other).require_same(saved, "path/to/vae")


def test_another_architecture_is_refused():
    with pytest.raises(ValueError, match="another architecture"):
        measured(StartingModel(make()), make(TINY | {"layers_per_block": 2}))


SHARE = """
import json, sys
from accelerate import PartialState
state = PartialState(cpu=True)
from latentvae.training.drift import measure_drift
from latentvae.training.starting import StartingModel
from tests.training.test_drift import CPU, PIXELS, batches, disturb, make, pictures
import torch
vae = make(dtype=torch.float64)
starting = StartingModel(vae)
disturb(vae, "encoder")
share = pictures(7)[state.process_index :: state.num_processes]
report = measure_drift(starting, vae, batches(share, 1), PIXELS, CPU)
with open(f"{sys.argv[1]}_{state.process_index}.json", "w") as file:
    json.dump(report.to_dict(), file)
"""


@pytest.mark.multiprocess
def test_any_number_of_processes_gives_the_same_figures(tmp_path):
    (tmp_path / "share.py").write_text(SHARE)
    reports = []
    for size in (1, 3):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(size)]
        command = [sys.executable, *launcher, str(tmp_path / "share.py"), str(tmp_path / f"of_{size}")]
        flags = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
        result = subprocess.run(
            command, env=os.environ | flags, capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == 0, result.stderr
        reports += [json.loads((tmp_path / f"of_{size}_{rank}.json").read_text()) for rank in range(size)]
    assert reports[0]["num_images"] == 7
    assert all(report == reports[0] for report in reports)
