"""What happens to an optimizer step that is not finite: with the fp16 loss scaler, and by `on_nonfinite`.

A CPU can run the scaler, although autocast to fp16 is refused there.
"""

import logging
import math

import pytest
import torch
from accelerate import Accelerator

from latentvae import assembly
from latentvae.assembly import build
from latentvae.losses.objective import Objective
from latentvae.training.update import NonFiniteLoss
from tests.training.recipes import tiny_recipe
from tests.training.test_trainer import assert_bit_identical, tensors_below
from tests.training.updaters import make_updater, micro_batches, moved, run, weights


def scaled(monkeypatch, **options):
    """Every Accelerator of `build` gets a loss scaler."""

    class ScaledAccelerator(Accelerator):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.scaler = torch.amp.GradScaler("cpu", **options)

    monkeypatch.setattr(assembly, "Accelerator", ScaledAccelerator)


def spoil(monkeypatch, is_spoilt):
    """Let the autoencoder's loss, not its terms, be infinite at the calls where `is_spoilt(number of the call)`."""
    original, calls = Objective.generator, []

    def generator(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        calls.append(None)
        if is_spoilt(len(calls)):
            result.loss.data.fill_(math.inf)
            result.loss.register_hook(lambda gradient: gradient * math.inf)
        return result

    monkeypatch.setattr(Objective, "generator", generator)


def test_the_scaler_changes_no_bit_of_either_network(photographs, tmp_path, monkeypatch):
    """The scale is a power of two that grows while discriminator and autoencoder step."""
    settings = tiny_recipe(photographs, "training.mixed_precision=no")
    plain = build(settings, tmp_path / "plain", progress=False).train()
    scaled(monkeypatch, init_scale=1024.0, growth_interval=2)
    other = build(settings, tmp_path / "scaled", progress=False).train()
    assert_bit_identical(tensors_below(plain.checkpoint), tensors_below(other.checkpoint))


def test_an_overflow_skips_the_step_and_the_average(photographs, tmp_path, monkeypatch):
    scaled(monkeypatch, init_scale=1024.0)
    spoil(monkeypatch, lambda call: call == 2)  # of two micro-batches each
    settings = tiny_recipe(photographs, "training.mixed_precision=no", "training.total_images=4")
    trainer = build(settings, tmp_path / "run", progress=False)
    before = {name: parameter.detach().clone() for name, parameter in trainer.vae.named_parameters()}
    trainer.train()
    assert trainer.updater.was_skipped and trainer.ema.num_updates == 0
    assert_bit_identical(before, dict(trainer.vae.named_parameters()))
    assert trainer.accelerator.scaler.get_scale() == 512


def test_gradients_that_overflow_at_any_scale_stop_the_run(photographs, tmp_path, monkeypatch):
    scaled(monkeypatch, init_scale=1.0, backoff_factor=0.01)
    spoil(monkeypatch, lambda call: True)
    trainer = build(tiny_recipe(photographs, "training.mixed_precision=no"), tmp_path / "run", progress=False)
    with pytest.raises(NonFiniteLoss, match="loss scale fell below"):
        trainer.train()


def test_a_gradient_alone_that_is_not_finite_stops_before_the_update(photographs, tmp_path, monkeypatch):
    spoil(monkeypatch, lambda call: call == 3)
    trainer = build(tiny_recipe(photographs), tmp_path / "run", progress=False)
    with pytest.raises(NonFiniteLoss, match="the gradient of the autoencoder"):
        trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.vae.parameters())


def poison(monkeypatch, updater, is_poisoned, term="reconstruction"):
    """Let a term of the second image be NaN, with its gradients, at the calls where `is_poisoned(number)`."""
    original, calls = updater.objective.generator, []

    def generator(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(None)
        if is_poisoned(len(calls)):
            result.loss.register_hook(lambda gradient: gradient * math.nan)
            result.terms[term][1] = math.nan
        return result

    monkeypatch.setattr(updater.objective, "generator", generator)


def test_a_step_that_is_left_out_changes_nothing_and_is_named(monkeypatch, caplog):
    updater = make_updater({"on_nonfinite": "skip", "ema_decay": 0.0})
    run(updater, 1)
    before = weights(updater)
    poison(monkeypatch, updater, lambda call: call == 1)  # the first of two micro-batches
    with caplog.at_level(logging.WARNING, "latentvae"):
        figures = updater.update(micro_batches(updater, 4), 4, stop=False)
    assert moved(before, weights(updater)) == set() and figures.keys() == {"learning_rate"}
    assert updater.was_skipped and not updater.trained_autoencoder and updater.num_nonfinite == 1
    assert all(p.grad is None for network in updater.networks.values() for p in network.module.parameters())
    assert "not finite after 4 images: reconstruction of image 5; the gradient of the autoencoder" in caplog.text
    assert "This step is left out, 1 of at most 10" in caplog.text
    (figures,) = run(updater, 1, start=8)
    assert not updater.was_skipped and updater.trained_autoencoder and figures["reconstruction"].isfinite()
    assert moved(before, weights(updater)) == before.keys()


def test_steps_left_out_are_as_if_they_had_not_been(monkeypatch):
    """Not even the optimizer's count of its steps knows them."""
    skipping, other = make_updater({"on_nonfinite": "skip"}), make_updater()
    run(skipping, 1)
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, skipping, lambda call: True)
        run(skipping, 3, start=4)
    run(skipping, 1, start=16)
    run(other, 1)
    run(other, 1, start=16)
    assert moved(weights(skipping), weights(other)) == set() and skipping.num_nonfinite == 3


def test_too_many_steps_left_out_end_the_run(monkeypatch):
    updater = make_updater({"on_nonfinite": "skip", "max_nonfinite": 2})
    poison(monkeypatch, updater, lambda call: True)
    run(updater, 2)
    with pytest.raises(NonFiniteLoss, match="reconstruction of image 9"):
        run(updater, 1, start=8)


@pytest.mark.parametrize("policy", ["stop", "rollback"])
def test_the_other_policies_raise_at_once_and_leave_no_gradient(monkeypatch, policy):
    updater = make_updater({"on_nonfinite": policy})
    before = weights(updater)
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, updater, lambda call: call == 2)
        with pytest.raises(NonFiniteLoss, match="reconstruction of image 3"):
            run(updater, 1)
    assert moved(before, weights(updater)) == set() and updater.num_nonfinite == 0  # who rolls back counts
    other = make_updater()
    run(updater, 1, start=4)  # a run that goes on
    run(other, 1, start=4)
    assert moved(weights(updater), weights(other)) == set()


def test_the_scaler_bears_a_step_that_is_left_out(monkeypatch):
    class ScaledAccelerator(Accelerator):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    monkeypatch.setattr("tests.training.updaters.Accelerator", ScaledAccelerator)
    updater = make_updater({"on_nonfinite": "skip"})
    before = weights(updater)
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, updater, lambda call: call == 1)
        run(updater, 1)
    assert updater.was_skipped and moved(before, weights(updater)) == set()
    run(updater, 1, start=4)
    assert not updater.was_skipped and moved(before, weights(updater)) == before.keys()


def test_an_anchor_sees_the_images_and_reaches_the_loss():
    vae_means = []

    class Anchor(torch.nn.Module):
        def forward(self, images):
            assert images.min() >= -1 and images.max() <= 1 and images.shape[1:] == (3, 16, 16)
            vae_means.append(images)
            return torch.zeros(len(images), 4, 8, 8)

    loss = {"anchor_weight": 0.1, "equivariance": 1.0, "adversarial_weight": 0.0}
    figures = run(make_updater(loss=loss, anchor=Anchor()), 1)[0]
    assert len(vae_means) == 2 and figures["anchor"] > 0
    with pytest.raises(ValueError, match="anchor"):
        run(make_updater(loss=loss), 1)
