"""The plain implementation that our training step is compared with does what it says, and the comparison runs."""

from pathlib import Path

import pytest
import torch
from torch import nn

from latentvae.model.presets import preset_config

SIZE, BATCH = 32, 2


class PixelDistance(nn.Module):
    """Stands in for LPIPS: (B, 3, H, W) twice => (B, 1, 1, 1)."""

    def forward(self, a, b):
        return (a - b).abs().mean((1, 2, 3), keepdim=True)


@pytest.fixture
def plain(monkeypatch):
    """The module plain_training."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import plain_training

    return plain_training


@pytest.fixture
def make(plain):
    """Options of PlainConfig => a new training, always of the same weights."""
    import diffusers

    def training(with_perceptual=False, **options):
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKL(**preset_config("f8c4-tiny"))
        options = {"perceptual": "none", "discriminator_start": 0, "learning_rate": 1e-3} | options
        made = plain.PlainTraining(vae, plain.PlainConfig(**options))
        if with_perceptual:
            made.perceptual = PixelDistance()
        torch.manual_seed(1)
        return made

    return training


def pictures(seed=0):
    return torch.rand(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def weights(network):
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()]).clone()


def test_networks_learn_on_alternate_batches(make):
    training = make()
    for number in range(4):
        vae, critic = weights(training.vae), weights(training.discriminator)
        training.step(pictures(number))
        assert torch.equal(weights(training.vae), vae) == bool(number % 2)
        assert torch.equal(weights(training.discriminator), critic) != bool(number % 2)
    assert (training.images_seen, training.autoencoder_images, training.discriminator_images) == (8, 4, 4)


def test_discriminator_waits_for_its_start(make):
    training = make(discriminator_start=3 * BATCH)
    before = weights(training.discriminator)
    for number in range(3):
        training.step(pictures(number))
        assert "adaptive_weight" not in training.logs
    assert torch.equal(weights(training.discriminator), before)
    training.step(pictures(3))  # the fourth batch is the discriminator's
    assert not torch.equal(weights(training.discriminator), before)


@pytest.mark.parametrize("as_published", [False, True])
def test_only_the_mended_script_trains_on_lpips(make, as_published):
    ends = []
    for with_perceptual in (False, True):
        training = make(with_perceptual, as_published=as_published, discriminator_start=None)
        training.step(pictures())
        ends.append(weights(training.vae))
    assert torch.equal(*ends) == as_published


@pytest.mark.parametrize("as_published", [False, True])
def test_only_the_published_script_leaks_gradients_into_the_autoencoder(make, as_published):
    training = make(as_published=as_published)
    training.step(pictures(0))
    training.step(pictures(1))
    assert all(parameter.grad is None for parameter in training.vae.parameters()) != as_published


def test_published_script_casts_its_weights(make):
    published, mended = (make(as_published=flag, precision="bf16") for flag in (True, False))
    assert {p.dtype for p in published.vae.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in mended.vae.parameters()} == {torch.float32}


def test_adaptive_weight_is_that_of_our_objective(make):
    """LDM's ratio by two backward passes is ours from the last layer's input, times the number of pixel values."""
    from latentvae.losses.config import LossConfig
    from latentvae.losses.objective import Objective
    from latentvae.model.autoencoder import AutoencoderKL
    from latentvae.training.step import AutoencoderStep

    training = make()
    images = pictures()
    ours = AutoencoderKL.from_preset("f8c4-tiny")
    ours.load_state_dict(training.vae.state_dict())
    latents = training.vae.encode(images).latent_dist.sample()
    torch.manual_seed(1)
    noise = torch.randn(latents.shape)
    config = LossConfig(
        reconstruction="l2",
        perceptual="none",
        adversarial_weight=1,
        adaptive_max=1e9,
        discriminator_start=0,
        adversarial_start=0,
    )
    result = Objective(config).generator(
        images,
        AutoencoderStep(ours)(images, noise),
        last_layer=ours.decoder.conv_out,
        discriminator=training.discriminator,
        images_seen=0,
    )
    torch.manual_seed(1)
    training.step(images)
    expected = min(result.adaptive_weight.item() * images[0].numel(), 1e4)
    assert training.logs["adaptive_weight"] == pytest.approx(expected, rel=1e-3)


def test_speed_part_runs_both_on_the_same_images(plain, photographs, tmp_path):
    import training_step

    given = training_step.parse(["--preset", "f8c4-tiny", "--resolution", "32", "--perceptual", "none", "--steps", "2"])
    setting = training_step.setting_of(given, "fp32")
    names = [training_step.OURS, training_step.PLAIN]
    speeds = training_step.measure_speed(names, setting, photographs, rounds=1, steps=2)
    assert list(speeds) == names and all(len(values) == 1 and values[0] > 0 for values in speeds.values())


def test_an_odd_number_of_batches_is_refused(plain, capsys):
    import training_step

    with pytest.raises(SystemExit):
        training_step.parse(["--steps", "3"])
    assert "even number" in capsys.readouterr().err
