"""One posterior deviation for ever: for diffusers, after updates, decay, averages and a reload."""

import diffusers
import pytest
import torch

from latentvae.checkpoint import load_model, save_model
from latentvae.errors import UserError
from latentvae.training.ema import ExponentialMovingAverage
from latentvae.training.posterior_sigma import fix_posterior
from tests.training.updaters import make_updater, moved, run, tiny_autoencoder, weights

SIGMA = 0.3


def fixed(**changes):
    vae = tiny_autoencoder(**changes)
    fix_posterior(vae, SIGMA)
    return vae


def last_layer(vae):
    return vae.encoder.conv_out if vae.quant_conv is None else vae.quant_conv


def rows(vae):
    """The part of the last layer that gives the log variance."""
    layer = last_layer(vae)
    return torch.cat([layer.weight[4:].flatten(), layer.bias[4:]]).detach().clone()


@pytest.mark.parametrize("has_quant_convs", [True, False])
def test_diffusers_sees_the_deviation_and_the_old_means(tmp_path, has_quant_convs):
    changes = {"use_quant_conv": has_quant_convs, "use_post_quant_conv": has_quant_convs}
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    save_model(fixed(**changes), tmp_path / "model")
    loaded = diffusers.AutoencoderKL.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        posterior = loaded.encode(images).latent_dist
        before = tiny_autoencoder(**changes).encode(images).latent_dist
    torch.testing.assert_close(posterior.std, torch.full_like(posterior.std, SIGMA))
    torch.testing.assert_close(posterior.mean, before.mean)
    assert not torch.allclose(before.std, posterior.std)


@pytest.mark.parametrize("has_quant_convs", [True, False])
def test_nothing_moves_it_and_all_else_trains(has_quant_convs):
    vae = fixed(use_quant_conv=has_quant_convs, use_post_quant_conv=has_quant_convs)
    ema = ExponentialMovingAverage(vae, decay=0.7, warmup_steps=2)
    updater = make_updater(vae=vae)  # with weight decay
    before, kept = weights(updater), rows(vae)
    for step in range(3):
        run(updater, 1, start=4 * step)
        ema.update()
    assert torch.equal(rows(vae), kept) and moved(before, weights(updater)) == before.keys()
    with ema.applied():
        assert torch.equal(rows(vae), kept)


def test_without_it_the_log_variances_do_train():
    vae = tiny_autoencoder()
    updater = make_updater(vae=vae)
    before = rows(vae)
    run(updater, 1)
    assert (rows(vae) != before).all()


def test_a_model_that_is_loaded_again_is_fixed_again(tmp_path):
    save_model(fixed(), tmp_path / "model")
    vae = load_model(tmp_path / "model")
    before = rows(vae)
    fix_posterior(vae, SIGMA)
    assert torch.equal(rows(vae), before)
    run(make_updater(vae=vae), 2)
    assert torch.equal(rows(vae), before)


def test_an_infinite_gradient_does_not_reach_it():
    vae = fixed()
    (vae.quant_conv.bias.sum() * float("inf")).backward()
    assert vae.quant_conv.bias.grad[:4].isinf().all() and (vae.quant_conv.bias.grad[4:] == 0).all()


def test_a_frozen_encoder_gets_the_values_too():
    vae = tiny_autoencoder()
    vae.requires_grad_(False)
    fix_posterior(vae, SIGMA)
    assert torch.equal(rows(vae), rows(fixed()))


@pytest.mark.parametrize("sigma", [1e-9, 1e6])
def test_what_a_posterior_cannot_say_is_refused(sigma):
    with pytest.raises(UserError, match=r"posterior_sigma is .*; give a value between 3e-07 and 2e\+04"):
        fix_posterior(tiny_autoencoder(), sigma)
