"""A very small real autoencoder and discriminator, and the composed loss written the long way."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from latentvae.losses.config import LossConfig
from latentvae.losses.discriminator import DiscriminatorConfig, PatchDiscriminator
from latentvae.losses.structural import ssim
from latentvae.losses.terms import (
    anchor_distance,
    charbonnier,
    hinge_generator,
    kl,
    l1,
    l2,
    non_saturating_generator,
)
from latentvae.model.autoencoder import AutoencoderKL

SIZE = 24
FACTOR = 2  # of the autoencoder below
SMALL = DiscriminatorConfig(base_channels=8, num_layers=2)


class Output(NamedTuple):
    moments: Tensor
    reconstructions: Tensor
    features: Tensor
    logvar: Tensor | None


def autoencoder(dtype=torch.float64) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL.from_preset(
        "f8c4-tiny",
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=2,
    )
    return vae.to(dtype)


def forward(vae, images, noise, likelihood=None) -> Output:
    moments = vae.quant_conv(vae.encoder(images))
    mean, logvar = moments.chunk(2, 1)
    features = vae.decoder.features(vae.post_quant_conv(mean + (0.5 * logvar).exp() * noise))
    logvar = None if likelihood is None else likelihood()
    return Output(moments, vae.decoder.conv_out(features), features.detach(), logvar)


def batch(dtype=torch.float64, size=SIZE, num_images=2):
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(num_images, 3, size, size, generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(num_images, 4, size // FACTOR, size // FACTOR, generator=generator, dtype=torch.float64)
    return images.to(dtype), noise.to(dtype)


def critic(dtype=torch.float64) -> PatchDiscriminator:
    torch.manual_seed(1)
    discriminator = PatchDiscriminator(config=SMALL).to(dtype)
    with torch.no_grad():  # a trained one has gradients far above adaptive_eps
        for parameter in discriminator.parameters():
            parameter.mul_(3)
    return discriminator


def config(**changes) -> LossConfig:
    base = {"perceptual": "none", "kl_weight": 1e-3, "discriminator_start": 0, "adversarial_start": 0}
    return LossConfig(**(base | {"discriminator": SMALL, "adaptive_max": 1e6} | changes))


def generator_loss(objective, vae, images, noise, discriminator=None, images_seen=0, likelihood=None, **options):
    output = forward(vae, images, noise, likelihood)
    return objective.generator(
        images,
        output,
        last_layer=vae.decoder.conv_out,
        discriminator=discriminator,
        images_seen=images_seen,
        **options,
    )


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def plain_loss(
    settings, vae, images, noise, discriminator=None, perceptual=None, likelihood=None, extra=(), anchor=None, scale=1.0
):
    """The composed loss and its weight as LDM computes them: on the graph, by `autograd.grad` at the last layer."""
    output = forward(vae, images, noise, likelihood)
    made = output.reconstructions
    pixel = {
        "l1": lambda: l1(images, made),
        "l2": lambda: l2(images, made),
        "charbonnier": lambda: charbonnier(images, made, settings.charbonnier_eps),
    }[settings.reconstruction]()
    others = settings.ssim_weight * (1 - ssim(images, made)) if settings.ssim_weight else 0.0
    if perceptual is not None:
        others = others + settings.perceptual_weight * perceptual(images, made)
    for weight, term in extra:
        others = others + weight * term(images, made, output.moments)
    if settings.likelihood == "optimal":
        gaussian = settings.reconstruction == "l2"
        seen = 0.5 * torch.log(pixel + (2 / 255) ** 2 / 12) if gaussian else torch.log(pixel + 2 / 255 / 4)
        nll = settings.reconstruction_weight * seen + others
    elif settings.likelihood == "learned":
        nll = (settings.reconstruction_weight * pixel + others) / output.logvar.exp() + output.logvar
    else:
        nll = settings.reconstruction_weight * pixel + others
    nll = nll.mean()
    loss = nll + settings.kl_weight * kl(output.moments, settings.free_bits).mean()
    if anchor is not None:
        loss = loss + settings.anchor_weight * anchor_distance(output.moments, anchor, scale).mean()
    ratio = None
    if discriminator is not None:
        adversarial_term = hinge_generator if settings.adversarial_loss == "hinge" else non_saturating_generator
        adversarial = adversarial_term(discriminator(made)).mean()
        last = vae.decoder.conv_out.weight
        (of_likelihood,) = torch.autograd.grad(nll, last, retain_graph=True)
        (of_adversarial,) = torch.autograd.grad(adversarial, last, retain_graph=True)
        ratio = of_likelihood.norm() / (of_adversarial.norm() + settings.adaptive_eps)
        ratio = ratio.clamp(0, settings.adaptive_max).detach()
        weight = settings.adversarial_weight * (ratio if settings.adversarial_balance == "adaptive" else 1)
        loss = loss + weight * adversarial
    return loss, ratio
