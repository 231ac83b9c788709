"""The objective on a real (very small) autoencoder: what it computes, and what it must leave alone."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from latentvae.losses.config import LossConfig
from latentvae.losses.discriminator import PatchDiscriminator
from latentvae.losses.objective import Objective
from latentvae.losses.perceptual import Perceptual
from tests.losses.networks import (
    SIZE,
    SMALL,
    autoencoder,
    batch,
    config,
    critic,
    forward,
    generator_loss,
    gradients,
    plain_loss,
)


@pytest.mark.parametrize(
    "changes",
    [
        {"adversarial_weight": 0.0},
        {"adversarial_weight": 0.5},
        {"adversarial_weight": 0.5, "reconstruction": "l2", "reconstruction_weight": 2.0},
        {"adversarial_weight": 0.5, "adaptive_max": 1e-3},
        {"adversarial_weight": 0.1, "adversarial_balance": "constant"},
    ],
)
def test_one_backward_gives_the_gradient_of_the_composed_loss(changes):
    settings, (images, noise) = config(**changes), batch()
    ours, theirs, discriminator = autoencoder(), autoencoder(), critic()
    uses_critic = settings.adversarial_weight > 0
    result = generator_loss(Objective(settings), ours, images, noise, discriminator)
    result.loss.backward()
    loss, _ = plain_loss(settings, theirs, images, noise, discriminator if uses_critic else None)
    loss.backward()
    torch.testing.assert_close(result.loss.detach(), loss.detach(), rtol=1e-12, atol=1e-12)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert a.grad is not None and b.grad.abs().sum() > 0, name
        assert (a.grad - b.grad).norm() <= 1e-10 * b.grad.norm() + 1e-16, name


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)]
)
@pytest.mark.parametrize("adaptive_max", [1e6, 1e-3])
def test_the_adaptive_weight_is_the_ldm_formula_the_long_way(dtype, tolerance, adaptive_max):
    settings = config(adversarial_weight=0.5, adaptive_max=adaptive_max)
    parameter_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
    vae, discriminator, (images, noise) = autoencoder(parameter_dtype), critic(parameter_dtype), batch(parameter_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        result = generator_loss(Objective(settings), vae, images, noise, discriminator)
        _, ratio = plain_loss(settings, vae, images, noise, discriminator)
    assert result.adaptive_weight.dtype == parameter_dtype and 0 < ratio <= adaptive_max
    assert result.adaptive_weight.item() == pytest.approx(ratio.item(), rel=tolerance)


def test_with_lpips_in_the_real_step(lpips_home):
    """The norm is that of reconstruction + perceptual together, as LDM has it, and the gradient is the whole one."""
    settings = config(adversarial_weight=0.5, perceptual="squeeze")
    ours, theirs, discriminator, (images, noise) = autoencoder(), autoencoder(), critic(), batch()
    perceptual = Perceptual("squeeze")
    result = generator_loss(Objective(settings, perceptual), ours, images, noise, discriminator)
    result.loss.backward()
    loss, ratio = plain_loss(settings, theirs, images, noise, discriminator, perceptual)
    loss.backward()
    assert result.adaptive_weight.item() == pytest.approx(ratio.item(), rel=1e-12)
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert set(result.terms) == {"reconstruction", "perceptual", "kl", "adversarial"}
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-10 * b.grad.norm() + 1e-16, name


@pytest.mark.parametrize("alone", ["reconstruction", "perceptual", "kl", "adversarial"])
@pytest.mark.parametrize("balance", ["constant", "adaptive"])
def test_each_term_alone_gives_a_gradient(lpips_home, alone, balance):
    weights = {f"{name}_weight": float(name == alone) for name in ("reconstruction", "perceptual", "kl", "adversarial")}
    settings = config(**weights, perceptual="squeeze" if alone == "perceptual" else "none", adversarial_balance=balance)
    perceptual = Perceptual("squeeze") if alone == "perceptual" else None
    vae, (images, noise) = autoencoder(), batch()
    result = generator_loss(Objective(settings, perceptual), vae, images, noise, critic())
    result.loss.backward()
    reached = {name for name, p in vae.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any(name.startswith("encoder.") for name in reached) or (alone, balance) == ("adversarial", "adaptive")
    if alone == "kl":
        assert not any(name.startswith("decoder.") for name in reached)
    elif (alone, balance) == ("adversarial", "adaptive"):  # nothing to balance against: LDM's ratio is 0 as well
        assert result.adaptive_weight == 0
    else:
        assert reached == {name for name, _ in vae.named_parameters()}


def test_the_step_of_one_network_leaves_the_other_alone():
    settings, (images, noise) = config(adversarial_weight=0.5), batch()
    objective, vae, discriminator = Objective(settings), autoencoder(), critic()
    fired = []
    for parameter in discriminator.parameters():  # what DistributedDataParallel hangs its reduction on
        parameter.register_post_accumulate_grad_hook(lambda p: fired.append(p))

    generator_loss(objective, vae, images, noise, discriminator).loss.backward()
    assert not fired and all(p.grad is None for p in discriminator.parameters())

    before = gradients(vae)
    assert all(g is not None for g in before.values())
    reconstructions = forward(vae, images, noise).reconstructions  # with its graph, as a careless caller would give it
    objective.discriminator(discriminator, images, reconstructions).loss.backward()
    assert all(torch.equal(g, gradients(vae)[name]) for name, g in before.items())
    assert len(fired) == len(list(discriminator.parameters()))
    assert all(p.grad.abs().sum() > 0 for p in discriminator.parameters())

    held = gradients(discriminator)
    generator_loss(objective, vae, images, noise, discriminator).loss.backward()
    assert all(torch.equal(g, gradients(discriminator)[name]) for name, g in held.items())


def test_duplicating_the_batch_changes_nothing():
    settings, (images, noise) = config(adversarial_weight=0.5), batch()
    discriminator, objective = critic(), Objective(settings)
    results, all_gradients, critics = [], [], []
    for repeats in (1, 3):
        vae = autoencoder()
        images_, noise_ = images.repeat(repeats, 1, 1, 1), noise.repeat(repeats, 1, 1, 1)
        results.append(generator_loss(objective, vae, images_, noise_, discriminator))
        results[-1].loss.backward()
        all_gradients.append(gradients(vae))
        reconstructions = forward(vae, images_, noise_).reconstructions
        critics.append(objective.discriminator(discriminator, images_, reconstructions).loss.item())
    once, thrice = results
    assert once.loss.item() == pytest.approx(thrice.loss.item(), rel=1e-12)
    assert once.adaptive_weight.item() == pytest.approx(thrice.adaptive_weight.item(), rel=1e-10)
    assert critics[0] == pytest.approx(critics[1], rel=1e-12)
    for name, term in once.terms.items():
        assert term.shape == (2,) and thrice.terms[name].shape == (6,)
        torch.testing.assert_close(term.repeat(3), thrice.terms[name])
    for name, gradient in all_gradients[0].items():
        torch.testing.assert_close(gradient, all_gradients[1][name], rtol=1e-9, atol=1e-14)


def test_the_weight_is_averaged_over_processes_before_the_norms():
    """Two processes that reduce the small gradients form one weight: that of the joint batch."""
    settings, (images, noise) = config(adversarial_weight=0.5), batch(num_images=4)
    vae, discriminator, objective = autoencoder(), critic(), Objective(settings)
    joint = generator_loss(objective, vae, images, noise, discriminator).adaptive_weight
    seen: list[Tensor] = []
    for half in (slice(0, 2), slice(2, 4)):
        generator_loss(objective, vae, images[half], noise[half], discriminator, average=lambda x: seen.append(x) or x)
    mean = (seen[0] + seen[1]) / 2
    assert mean.numel() == 2 * vae.decoder.conv_out.weight.numel()
    for half in (slice(0, 2), slice(2, 4)):
        result = generator_loss(objective, vae, images[half], noise[half], discriminator, average=lambda _: mean)
        assert result.adaptive_weight.item() == pytest.approx(joint.item(), rel=1e-12)


def test_a_gradient_scaler_scales_the_whole_gradient():
    settings, (images, noise) = config(adversarial_weight=0.5), batch()
    discriminator, objective, all_gradients = critic(), Objective(settings), []
    for scale in (1.0, 1024.0):
        vae = autoencoder()
        (generator_loss(objective, vae, images, noise, discriminator).loss * scale).backward()
        all_gradients.append(gradients(vae))
    for name, gradient in all_gradients[0].items():
        torch.testing.assert_close(gradient * 1024, all_gradients[1][name], rtol=1e-12, atol=0)


def test_half_precision_outputs_are_composed_in_float32():
    vae, discriminator, (images, noise) = autoencoder(torch.float32), critic(torch.float32), batch(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = generator_loss(Objective(config(adversarial_weight=0.5)), vae, images, noise, discriminator)
    assert result.loss.dtype == torch.float32
    assert all(term.dtype == torch.float32 and not term.requires_grad for term in result.terms.values())
    result.loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in vae.parameters())


def test_a_frozen_encoder_and_a_frozen_decoder():
    settings, (images, noise) = config(adversarial_weight=0.5), batch()
    for frozen in ("encoder", "decoder"):
        vae = autoencoder()
        for name, parameter in vae.named_parameters():
            parameter.requires_grad_(not name.startswith((frozen, "quant_conv" if frozen == "encoder" else "post")))
        result = generator_loss(Objective(settings), vae, images, noise, critic())
        result.loss.backward()
        assert result.adaptive_weight > 0
        assert all((p.grad is not None) == p.requires_grad for p in vae.parameters())


def test_the_discriminator_loss_and_what_is_watched():
    class Brightness(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean(1, keepdim=True) * 4

    images, fakes = torch.full((2, 3, 8, 8), 0.5), torch.stack([torch.full((3, 8, 8), v) for v in (-0.125, 0.25)])
    result = Objective(config(adversarial_weight=1.0)).discriminator(Brightness(), images, fakes)
    assert result.terms["discriminator"].tolist() == [0.25, 1.0]  # 0.5 (relu(1 - 2) + relu(1 + fake)), fake -0.5 and 1
    assert result.loss.item() == 0.625
    assert {name: value.item() for name, value in result.watched.items()} == {
        "real_logits": 2.0,
        "fake_logits": 0.25,
        "accuracy": 0.75,
    }


def test_the_discriminator_learns_to_tell():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(config=SMALL)
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=2e-3, betas=(0.5, 0.9))
    objective = Objective(config(adversarial_weight=1.0))
    for _ in range(20):
        images = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
        fakes = nn.functional.avg_pool2d(images, 3, stride=1, padding=1)
        result = objective.discriminator(discriminator, images, fakes)
        optimizer.zero_grad()
        result.loss.backward()
        optimizer.step()
    watched = result.watched
    assert watched["accuracy"] > 0.95 and watched["real_logits"] > watched["fake_logits"] + 1


def test_starts():
    objective = Objective(config(adversarial_weight=0.5, discriminator_start=100, adversarial_start=200))
    assert [objective.active_discriminator(n) for n in (0, 99, 100, 200)] == [False, False, True, True]
    assert [objective.active_adversarial(n) for n in (0, 199, 200)] == [False, False, True]
    off = Objective(config())
    assert not off.active_discriminator(10**9) and not off.active_adversarial(10**9)
    vae, (images, noise) = autoencoder(), batch()
    early = generator_loss(objective, vae, images, noise, critic(), images_seen=199)
    assert early.adaptive_weight is None and "adversarial" not in early.terms


def test_default_starts_follow_the_run_and_never_contradict_a_given_one():
    def starts(total, **given):
        resolved = LossConfig(**given).resolved(total)
        return resolved.discriminator_start, resolved.adversarial_start

    assert starts(1000) == (375, 500)
    assert starts(1000, adversarial_start=100) == (100, 100)
    assert starts(1000, discriminator_start=700) == (700, 700)
    assert starts(1000, discriminator_start=0, adversarial_start=1) == (0, 1)
    assert LossConfig().resolved(1000).resolved(9) == LossConfig().resolved(1000)


def test_mistakes_are_refused():
    with pytest.raises(ValidationError, match="before discriminator_start"):
        LossConfig(discriminator_start=10, adversarial_start=5)
    with pytest.raises(ValidationError):
        LossConfig(kl_wieght=1)
    with pytest.raises(ValueError, match="resolved"):
        Objective(LossConfig(perceptual="none", adversarial_weight=0.5))
    with pytest.raises(ValueError, match="do not agree"):
        Objective(LossConfig())
    vae, (images, noise) = autoencoder(), batch()
    with pytest.raises(TypeError, match="plain discriminator"):
        generator_loss(Objective(config(adversarial_weight=0.5)), vae, images, noise, None)


def test_from_config_builds_what_it_needs(lpips_home):
    assert Objective.from_config(LossConfig(perceptual="none")).perceptual is None
    assert Objective.from_config(LossConfig(perceptual_weight=0)).perceptual is None
    objective = Objective.from_config(LossConfig(perceptual="squeeze", perceptual_bands=[(0, 1, 2)]), channels=4)
    assert objective.perceptual.channels == 4
