"""What trains when: every trainable parameter is updated, every frozen one stays bit for bit, in every phase."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from latentvae.errors import UserError
from tests.training.updaters import GLOBAL_BATCH, make_updater, moved, run, tiny_autoencoder, weights

ALL_OPTIONS = {
    "likelihood": "learned",
    "equivariance": 0.5,
    "equivariance_scales": (16, 31),
    "latent_noise": 0.5,
    "ssim_weight": 0.5,
    "discriminator": {"base_channels": 8, "num_layers": 1},
}


def frozen_by(prefixes):
    vae = tiny_autoencoder()
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_(not name.startswith(prefixes))
    return vae


@pytest.mark.parametrize(
    "frozen", [("nothing",), ("encoder.", "quant_conv."), ("decoder.up_blocks.", "encoder.down_blocks.0.")]
)
@pytest.mark.parametrize("loss", [{}, ALL_OPTIONS])
def test_all_that_is_trainable_moves_and_nothing_else(frozen, loss):
    updater = make_updater(loss=loss, vae=frozen_by(frozen))
    before = weights(updater)
    run(updater, 3)
    still = {name for name in before if name.removeprefix("autoencoder.").startswith(frozen)}
    assert moved(before, weights(updater)) == before.keys() - still
    assert updater.trained_autoencoder and not updater.was_skipped


def test_before_its_start_the_autoencoder_only_reconstructs_for_the_discriminator():
    loss = ALL_OPTIONS | {"autoencoder_start": 2 * GLOBAL_BATCH, "adversarial_start": 2 * GLOBAL_BATCH}
    updater = make_updater(loss=loss)
    before = weights(updater)
    first, second = run(updater, 2)
    discriminator = {name for name in before if name.startswith("discriminator.")}
    assert moved(before, weights(updater)) == discriminator and not updater.trained_autoencoder
    assert {"reconstruction", "kl", "discriminator", "discriminator_grad_norm"} <= first.keys()
    assert "autoencoder_grad_norm" not in second
    assert not updater.networks["autoencoder"].optimizer.state  # no moments of gradients that were none
    run(updater, 1, start=2 * GLOBAL_BATCH)
    assert moved(before, weights(updater)) == before.keys() and updater.trained_autoencoder


def test_no_gradient_is_made_for_a_frozen_autoencoder():
    updater = make_updater(loss={"autoencoder_start": 100, "adversarial_start": 100})
    outputs = []
    updater.step.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    run(updater, 1)
    assert outputs and not any(output.reconstructions.requires_grad for output in outputs)


def test_the_warmed_up_discriminator_is_the_one_of_a_run_that_only_had_it():
    """All steps draw the same noise and images, whatever trains."""
    warm = make_updater(loss={"autoencoder_start": 8, "adversarial_start": 8})
    run(warm, 2)
    still = make_updater(loss={"autoencoder_start": 800, "adversarial_start": 800})
    run(still, 2)
    assert moved(weights(warm), weights(still)) == set()


def test_the_decoder_finishes_alone_and_without_latent_noise():
    updater = make_updater({"decoder_only_start": 8}, {"latent_noise": 3.0})
    noises = []
    forward = type(updater.step).forward

    def noting(self, images, noise, transform, latent_noise):
        noises.append(latent_noise)
        return forward(self, images, noise, transform, latent_noise)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(updater.step), "forward", noting)
        run(updater, 2)
        middle, wrapper = weights(updater), updater.step
        run(updater, 2, start=8)
    assert [noise is None for noise in noises] == [False] * 4 + [True] * 4  # two micro-batches a step
    encoder = {name for name in middle if name.startswith(("autoencoder.encoder.", "autoencoder.quant_conv."))}
    assert moved(middle, weights(updater)) == middle.keys() - encoder and updater.step is not wrapper
    # The optimizer still holds them, so that a checkpoint has the same parameters before and after.
    held = {id(p) for group in updater.networks["autoencoder"].optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in updater.vae.parameters()}


def test_a_run_that_starts_within_the_finish_trains_the_decoder_alone():
    updater = make_updater({"decoder_only_start": 8})
    before = weights(updater)
    run(updater, 1, start=8)
    assert not any(name.startswith("autoencoder.encoder.") for name in moved(before, weights(updater)))
    run(updater, 1, start=4)  # a run that went back to a checkpoint before it
    assert "autoencoder.encoder.conv_in.weight" in moved(before, weights(updater))


@pytest.mark.parametrize(
    ("training", "loss", "message"),
    [
        ({}, {"autoencoder_start": 8, "adversarial_weight": 0.0}, "no discriminator to train before it"),
        (
            {},
            {"autoencoder_start": 8, "discriminator_start": 8, "adversarial_start": 8},
            "nothing trains on the first 8",
        ),
        (
            {},
            {"autoencoder_start": 8, "discriminator_start": 4, "adversarial_start": 8},
            "nothing trains on the first 4",
        ),
        ({"decoder_only_start": 8}, {}, "selects nothing else"),
    ],
)
def test_a_phase_that_would_train_nothing_is_refused(training, loss, message):
    vae = frozen_by(("decoder.", "post_quant_conv.")) if training else None
    with pytest.raises(UserError, match=message):
        make_updater(training, loss, vae=vae)


def trained_by(processes, out):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *launcher, "-m", "tests.training.phase_run", str(out)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return [load_file(out / f"{rank}.safetensors") for rank in range(processes)]


@pytest.mark.multiprocess
def test_two_processes_pass_through_all_phases_as_one_does(tmp_path):
    """Warm-up of the discriminator, training with everything on, decoder-only finish; float64."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    (one,) = trained_by(1, tmp_path / "one")
    first, second = trained_by(2, tmp_path / "two")
    assert moved(first, second) == set()
    assert max((one[name] - first[name]).abs().max().item() for name in one) < 1e-9
    assert one["likelihood.logvar"] != 0


def test_float64_runs_in_float64():
    updater = make_updater(loss=ALL_OPTIONS, dtype=torch.float64)
    assert run(updater, 1)[0]["reconstruction"].dtype == torch.float64
