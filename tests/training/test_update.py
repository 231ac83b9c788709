"""The optimizer step under the fp16 loss scaler, which a CPU can run although autocast to fp16 is refused there."""

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
