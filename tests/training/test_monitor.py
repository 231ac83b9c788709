"""The monitor warns of what goes wrong, with its remedy, once; of a sound run it says nothing."""

import pytest

from latentvae.training.monitor import CollapseMonitor

SETTINGS = {
    "loss": {
        "adversarial_weight": 0.5,
        "discriminator_start": 1000,
        "adversarial_start": 2000,
        "adaptive_max": 0.05,
        "kl_weight": 1e-6,
    },
    "training": {"total_images": 10_000, "max_grad_norm": 1.0},
}
SOUND = {
    "reconstruction": 0.1,
    "kl": 3.0,
    "autoencoder_grad_norm": 2.0,
    "discriminator_grad_norm": 1.0,
    "discriminator_accuracy": 0.7,
    "discriminator_real_logits": 0.4,
    "discriminator_fake_logits": -0.4,
    "adversarial": 0.4,
    "adaptive_weight": 0.01,
}
MEASURED = {"validation_psnr": 25.0, "validation_active_channels": 4, "validation_latent_channels": 4}


def observe(monitor, *changes, start=5000, sound=SOUND):
    """Rows of 100 images each; the warnings of all."""
    rows = [{"images_seen": start + 100 * index, **sound, **change} for index, change in enumerate(changes)]
    return [warning for row in rows for warning in monitor.observe(row)]


def test_a_sound_run_is_not_spoken_of():
    monitor = CollapseMonitor(SETTINGS)
    assert observe(monitor, *[{}] * 20) == []
    assert observe(monitor, *[{"validation_psnr": psnr} for psnr in (25, 26, 25.1, 27, 26.2)], sound=MEASURED) == []
    assert monitor.standing == {}


@pytest.mark.parametrize(
    "sick, remedy",
    [
        ({"discriminator_accuracy": 0.96}, "training.discriminator_learning_rate"),
        ({"discriminator_real_logits": 2.5, "discriminator_fake_logits": -2.0}, "loss.adversarial_weight"),
        ({"adaptive_weight": 0.0495}, "loss.adaptive_max"),
        ({"kl": 0.001}, "loss.kl_weight"),
        ({"autoencoder_grad_norm": 101.0}, "training.learning_rate"),
        ({"discriminator_grad_norm": 101.0}, "training.discriminator_learning_rate"),
    ],
    ids=str,
)
def test_three_bad_intervals_in_a_row_give_one_warning_with_its_remedy(sick, remedy):
    monitor = CollapseMonitor(SETTINGS)
    assert observe(monitor, sick, sick, {}, sick, sick) == []  # never three in a row
    (warning,) = observe(monitor, sick, sick, sick, sick)
    assert remedy in warning and "\n" not in warning and list(monitor.standing.values()) == [warning]
    assert observe(monitor, *[sick] * 5) == []  # once
    assert observe(monitor, {}) == [] and monitor.standing == {}  # recovered
    assert len(observe(monitor, *[sick] * 3)) == 1  # and again


@pytest.mark.parametrize(
    "near",
    [
        {"discriminator_accuracy": 0.95},
        {"discriminator_real_logits": 2.0, "discriminator_fake_logits": -1.9},
        {"adaptive_weight": 0.047},
        {"kl": 0.011},
        {"autoencoder_grad_norm": 99.0},
    ],
    ids=str,
)
def test_what_lies_just_within_the_bounds_is_left_alone(near):
    assert observe(CollapseMonitor(SETTINGS), *[near] * 10) == []


def test_a_discriminator_that_warms_up_alone_may_be_strong():
    strong = {"discriminator_accuracy": 1.0}
    assert observe(CollapseMonitor(SETTINGS), *[strong] * 5, start=1200) == []
    assert len(observe(CollapseMonitor(SETTINGS), *[strong] * 5, start=2100)) == 1


def test_a_blind_discriminator_is_told_only_while_the_generators_term_grows():
    growing = [{"discriminator_accuracy": 0.5, "adversarial": 0.1 * step} for step in range(8)]
    level = [{"discriminator_accuracy": 0.5, "adversarial": 0.4}] * 8
    (warning,) = observe(CollapseMonitor(SETTINGS), *growing)
    assert "pushes the decoder nowhere" in warning
    assert observe(CollapseMonitor(SETTINGS), *level) == []
    assert observe(CollapseMonitor(SETTINGS), *[row | {"discriminator_accuracy": 0.6} for row in growing]) == []
    assert observe(CollapseMonitor(SETTINGS), *growing, start=500) == []  # it has just begun


def test_validations_tell_of_unused_channels_and_of_a_falling_psnr():
    monitor = CollapseMonitor(SETTINGS)
    unused = {"validation_active_channels": 3}
    assert observe(monitor, unused, sound=MEASURED) == []
    (warning,) = observe(monitor, unused, sound=MEASURED)
    assert "3 of 4 latent channels" in warning
    (warning,) = observe(monitor, {"validation_psnr": 23.9}, sound=MEASURED)
    assert "1.1 dB below" in warning and "adversarial_weight" in warning
    (warning,) = observe(CollapseMonitor(SETTINGS), {}, {"validation_psnr": 20}, start=100, sound=MEASURED)
    assert "adversarial_weight" not in warning and "training.learning_rate" in warning


def test_without_a_kl_term_its_size_means_nothing():
    settings = SETTINGS | {"loss": SETTINGS["loss"] | {"kl_weight": 0.0}}
    assert observe(CollapseMonitor(settings), *[{"kl": 0.0}] * 5) == []


def test_a_resumed_run_does_not_repeat_what_was_said():
    sick = [{"images_seen": 5000 + n, **SOUND, "kl": 0.0} for n in range(3)]
    monitor = CollapseMonitor.replayed(SETTINGS, [*sick, {"images_seen": 5003, "event": "resumed"}])
    assert len(monitor.standing) == 1 and observe(monitor, {"kl": 0.0}) == []
