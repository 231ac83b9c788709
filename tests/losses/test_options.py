"""Every option of the loss, alone and together, against the composed loss written the long way, in float64."""

import pytest
import torch
from torch import nn

from latentvae.losses.config import LossConfig
from latentvae.losses.likelihood import LearnedLogvar
from latentvae.losses.objective import Objective
from latentvae.losses.perceptual import Perceptual
from tests.losses.networks import (
    FACTOR,
    Output,
    autoencoder,
    batch,
    config,
    critic,
    forward,
    generator_loss,
    gradients,
    plain_loss,
)
from tests.losses.test_extra import Brightness

EXTRA = {"extra": [{"term": "python:tests.losses.test_extra:Brightness", "weight": 0.7, "arguments": {"factor": 2.0}}]}
ADAPTIVE = {"adversarial_weight": 0.5}
CONSTANT = {"adversarial_weight": 0.1, "adversarial_balance": "constant"}
SCALE = 1.7

OPTIONS = {
    "charbonnier": {"reconstruction": "charbonnier", "charbonnier_eps": 0.1},
    "ssim": {"ssim_weight": 0.6},
    "free_bits": {"free_bits": 0.4, "kl_weight": 0.1},
    "learned": {"likelihood": "learned"},
    "learned_l2": {"likelihood": "learned", "reconstruction": "l2", "reconstruction_weight": 2.0},
    "optimal_l1": {"likelihood": "optimal"},
    "optimal_l2": {"likelihood": "optimal", "reconstruction": "l2", "reconstruction_weight": 3.0},
    "optimal_charbonnier": {"likelihood": "optimal", "reconstruction": "charbonnier"},
    "anchor": {"anchor_weight": 0.3},
    "extra": EXTRA,
    "together_learned": {"likelihood": "learned", "reconstruction": "charbonnier", "ssim_weight": 0.5, "free_bits": 0.4}
    | {"anchor_weight": 0.3, "kl_weight": 0.1}
    | EXTRA,
    "together_optimal": {"likelihood": "optimal", "reconstruction": "l2", "ssim_weight": 0.5, "anchor_weight": 0.3}
    | EXTRA,
}
ADVERSARIAL = {
    "off": {},
    "hinge_adaptive": ADAPTIVE,
    "hinge_constant": CONSTANT,
    "non_saturating_adaptive": ADAPTIVE | {"adversarial_loss": "non_saturating"},
    "non_saturating_clamped": ADAPTIVE | {"adversarial_loss": "non_saturating", "adaptive_max": 1e-3},
}


def learned_variance(settings):
    if settings.likelihood != "learned":
        return None
    module = LearnedLogvar().double()
    with torch.no_grad():
        module.logvar.fill_(-1.3)
    return module


def anchor_of(settings, images):
    if not settings.anchor_weight:
        return None
    means = autoencoder().quant_conv(autoencoder().encoder(images)).chunk(2, 1)[0].detach()
    return means + torch.randn(means.shape, dtype=means.dtype, generator=torch.Generator().manual_seed(5))


def compare(settings, images, noise, perceptual=None, frozen=()):
    """Loss and all gradients of both ways; returns ours."""
    extra = [(term.weight, Brightness(**term.arguments)) for term in settings.extra]
    objective = Objective.from_config(settings, latent_scale=SCALE)
    discriminator, anchor = critic() if settings.has_adversarial else None, anchor_of(settings, images)
    sides = []
    for way in ("ours", "plain"):
        vae, likelihood = autoencoder(), learned_variance(settings)
        for name, parameter in vae.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        if way == "ours":
            result = generator_loss(objective, vae, images, noise, discriminator, likelihood=likelihood, anchor=anchor)
            loss, ratio = result.loss, result.adaptive_weight
        else:
            loss, ratio = plain_loss(
                settings, vae, images, noise, discriminator, perceptual, likelihood, extra, anchor, SCALE
            )
        loss.backward()
        if discriminator is not None:
            assert way == "plain" or all(p.grad is None for p in discriminator.parameters())
            discriminator.zero_grad()
        found = gradients(vae) | ({} if likelihood is None else gradients(likelihood))
        sides.append((loss.detach(), ratio, found))
    (loss, ratio, ours), (plain, expected, theirs) = sides
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=1e-12)
    if settings.has_adversarial and settings.adversarial_balance == "adaptive":
        assert ratio.item() == pytest.approx(expected.item(), rel=1e-10) and ratio > 0
    else:
        assert ratio is None
    for name, gradient in theirs.items():
        if gradient is None:
            assert ours[name] is None, name
            continue
        assert gradient.abs().sum() > 0, name
        assert (ours[name] - gradient).norm() <= 1e-10 * gradient.norm() + 1e-16, name
    return result, ours


@pytest.mark.parametrize("adversarial", ADVERSARIAL)
@pytest.mark.parametrize("option", OPTIONS)
def test_one_backward_gives_the_gradient_of_the_composed_loss(option, adversarial):
    settings = config(**(OPTIONS[option] | ADVERSARIAL[adversarial]))
    result, found = compare(settings, *batch())
    assert all(term.shape == (2,) and not term.requires_grad for term in result.terms.values())
    assert ("logvar" in found) == (settings.likelihood == "learned")


def test_everything_with_lpips(lpips_home):
    settings = config(**(OPTIONS["together_learned"] | ADAPTIVE | {"perceptual": "squeeze", "perceptual_weight": 0.8}))
    result, _ = compare(settings, *batch(), perceptual=Perceptual("squeeze"))
    assert set(result.terms) == {
        *("reconstruction", "ssim", "perceptual", "Brightness", "logvar", "kl", "anchor", "adversarial")
    }


@pytest.mark.parametrize("adversarial", ["off", "hinge_adaptive"])
@pytest.mark.parametrize(  # the long way differentiates at conv_out, so that one stays trainable
    "frozen", [("encoder", "quant_conv"), ("decoder.up", "decoder.mid", "decoder.conv_in", "post_quant_conv")]
)
def test_with_one_half_frozen(frozen, adversarial):
    compare(config(**(OPTIONS["together_learned"] | ADVERSARIAL[adversarial])), *batch(), frozen=frozen)


@pytest.mark.parametrize("adversarial", ["off", "hinge_adaptive"])
def test_images_that_are_not_square(adversarial):
    images, noise = batch(size=32)
    settings = config(**(OPTIONS["together_optimal"] | ADVERSARIAL[adversarial]))
    compare(settings, images[:, :, :20], noise[:, :, :10])


def test_the_adaptive_weight_balances_what_the_likelihood_made_of_the_errors():
    """A variance of exp(-1.3) makes the gradient of the errors, and with it the weight, exp(1.3) times as large."""
    images, noise = batch()
    weights = []
    for likelihood in ("fixed", "learned"):
        settings = config(likelihood=likelihood, **ADAPTIVE)
        options = {"likelihood": learned_variance(settings)}
        weights.append(generator_loss(Objective(settings), autoencoder(), images, noise, critic(), **options))
    fixed, learned = (result.adaptive_weight.item() for result in weights)
    assert learned == pytest.approx(fixed * torch.tensor(1.3, dtype=torch.float64).exp().item(), rel=0.02)


@pytest.mark.parametrize("option", OPTIONS)
def test_the_batch_is_a_mean_over_images(option):
    """Duplicating it changes nothing, and the mean over two halves is the whole: processes and accumulation add up."""
    settings = config(**(OPTIONS[option] | CONSTANT))
    objective, discriminator = Objective.from_config(settings, latent_scale=SCALE), critic()
    images, noise = batch(num_images=4)
    anchor = anchor_of(settings, images)

    def run(indices):
        vae, likelihood = autoencoder(), learned_variance(settings)
        part = None if anchor is None else anchor[indices]
        result = generator_loss(
            objective, vae, images[indices], noise[indices], discriminator, likelihood=likelihood, anchor=part
        )
        result.loss.backward()
        found = gradients(vae) | ({} if likelihood is None else gradients(likelihood))
        return result, found

    whole, expected = run([0, 1, 2, 3])
    twice, doubled = run([0, 1, 2, 3, 0, 1, 2, 3])
    (first, a), (second, b) = run([0, 1]), run([2, 3])
    assert twice.loss.item() == pytest.approx(whole.loss.item(), rel=1e-12)
    assert (first.loss.item() + second.loss.item()) / 2 == pytest.approx(whole.loss.item(), rel=1e-12)
    for name, term in whole.terms.items():
        torch.testing.assert_close(torch.cat([first.terms[name], second.terms[name]]), term, rtol=1e-10, atol=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(doubled[name], gradient, rtol=1e-9, atol=1e-13)
        torch.testing.assert_close((a[name] + b[name]) / 2, gradient, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("option", [name for name in OPTIONS if "extra" not in name and "together" not in name])
def test_the_loss_of_a_constant_error_is_the_same_at_every_resolution(option):
    settings, losses = config(**OPTIONS[option]), []
    for size in (16, 64):
        images = torch.full((2, 3, size, size * 2), -0.25, dtype=torch.float64)
        moments = torch.full((2, 8, size // 8, size // 4), 0.3, dtype=torch.float64)
        likelihood = learned_variance(settings)
        output = Output(moments, images + 0.125, torch.zeros(2, 8, size, size * 2), likelihood and likelihood())
        anchor = moments[:, :4] + 0.5 if settings.anchor_weight else None
        options = {"last_layer": nn.Conv2d(8, 3, 3), "discriminator": None, "images_seen": 0, "anchor": anchor}
        result = Objective(settings, latent_scale=SCALE).generator(images, output, **options)
        losses.append(result.loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9) and losses[0] != 0


def test_targets_of_another_size_than_the_latents():
    """A shrunken latent is decoded and compared with the shrunken image; moments and anchor keep their size."""
    settings = config(**(OPTIONS["together_learned"] | ADAPTIVE))
    objective = Objective.from_config(settings, latent_scale=SCALE)
    (images, _), likelihood, vae = batch(), learned_variance(settings), autoencoder()
    anchor = anchor_of(settings, images)
    moments = vae.quant_conv(vae.encoder(images))
    latents = moments.chunk(2, 1)[0][:, :, :8, :10].rot90(1, (2, 3))
    features = vae.decoder.features(vae.post_quant_conv(latents))
    output = Output(moments, vae.decoder.conv_out(features), features.detach(), likelihood())
    targets = images[:, :, : 8 * FACTOR, : 10 * FACTOR].rot90(1, (2, 3))
    assert targets.shape == output.reconstructions.shape != images.shape
    result = objective.generator(
        targets,
        output,
        last_layer=vae.decoder.conv_out,
        discriminator=critic(),
        images_seen=0,
        anchor=anchor,
    )
    result.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())
    assert result.adaptive_weight > 0


def test_the_kl_that_is_logged_is_the_true_one():
    images, noise = batch()
    plain = generator_loss(Objective(config(kl_weight=1.0)), autoencoder(), images, noise)
    free = generator_loss(Objective(config(kl_weight=1.0, free_bits=5.0)), autoencoder(), images, noise)
    assert torch.equal(plain.terms["kl"], free.terms["kl"]) and (free.terms["kl"] < 5).all()
    assert free.loss.item() == pytest.approx(plain.loss.item() - plain.terms["kl"].mean().item() + 5.0)


def test_the_kl_weight_follows_its_schedule():
    images, noise = batch()
    objective = Objective(config(kl_weight=2.0, kl_schedule="linear", kl_warmup_images=100))
    start, middle, end = (
        generator_loss(objective, autoencoder(), images, noise, images_seen=n).loss.item() for n in (0, 50, 100)
    )
    kl = generator_loss(objective, autoencoder(), images, noise).terms["kl"].mean().item()
    assert middle - start == pytest.approx(kl) and end - start == pytest.approx(2 * kl)


def test_what_the_likelihood_divides_by_is_logged():
    images, noise = batch()
    learned, optimal = config(likelihood="learned"), config(likelihood="optimal")
    result = generator_loss(Objective(learned), autoencoder(), images, noise, likelihood=learned_variance(learned))
    assert result.terms["logvar"].tolist() == pytest.approx([learned_variance(learned)().item()] * 2)
    result = generator_loss(Objective(optimal), autoencoder(), images, noise)
    expected = (result.terms["reconstruction"] + 2 / 1020).log()
    torch.testing.assert_close(result.terms["logvar"], expected)
    assert "logvar" not in generator_loss(Objective(config()), autoencoder(), images, noise).terms


def test_the_discriminator_that_does_not_saturate():
    class Brightest(nn.Module):
        def forward(self, images):
            return images.mean(1, keepdim=True)

    objective = Objective(config(adversarial_weight=1.0, adversarial_loss="non_saturating"))
    images, fakes = torch.full((2, 3, 4, 6), 0.5), torch.full((2, 3, 4, 6), -0.25)
    result = objective.discriminator(Brightest(), images, fakes)
    softplus = nn.functional.softplus(torch.tensor([-0.5, -0.25])).mean().item()
    assert result.terms["discriminator"].tolist() == pytest.approx([softplus] * 2)
    assert result.watched["accuracy"] == 1.0


def test_when_the_autoencoder_trains():
    objective = Objective(config(autoencoder_start=100))
    assert [objective.active_autoencoder(n) for n in (0, 99, 100)] == [False, False, True]
    assert Objective(LossConfig(perceptual="none")).active_autoencoder(0)


def test_missing_parts_are_refused():
    images, noise = batch()
    with pytest.raises(ValueError, match="gave no logvar"):
        generator_loss(Objective(config(likelihood="learned")), autoencoder(), images, noise)
    with pytest.raises(ValueError, match="posterior means are not given"):
        generator_loss(Objective(config(anchor_weight=1.0)), autoencoder(), images, noise)
    vae = autoencoder()
    anchor = forward(vae, images, noise).moments.chunk(2, 1)[0]
    watched = generator_loss(Objective(config()), vae, images, noise, anchor=anchor)  # weight 0: measured all the same
    assert watched.terms["anchor"].tolist() == [0.0, 0.0]
