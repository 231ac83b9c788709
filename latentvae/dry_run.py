"""What a run would be, said before it starts."""

from contextlib import nullcontext

import torch
from torch import nn

from latentvae.assembly import open_images, processes
from latentvae.config import dump_yaml
from latentvae.losses.discriminator import PatchDiscriminator
from latentvae.losses.extra import load_terms
from latentvae.losses.terms import LossWeights, to_ldm_units
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.recipe import Recipe, check, make_model, require_given
from latentvae.training.networks import select
from latentvae.training.phases import check_phases
from latentvae.training.precision import resolve_precision


def describe(recipe: Recipe) -> str:
    """What a run of `recipe` would be, without starting it: every value, then what follows from them."""
    require_given(recipe)
    with torch.device("meta") if recipe.model.start_from is None else nullcontext():
        vae = make_model(recipe)
    check(recipe, vae)
    load_terms(recipe.loss.extra)  # refuses what cannot be one
    loss = recipe.loss.resolved(recipe.training.total_images)
    select(vae, recipe.training)  # as the next, it refuses what a run would refuse
    check_phases(recipe.training, loss, vae)
    images = open_images(recipe, vae.config.in_channels).summary(recipe)
    return "\n".join([dump_yaml(recipe.model_copy(update={"loss": loss})), *summarize(recipe, vae), *images])


def summarize(recipe: Recipe, vae: AutoencoderKL, micro_batch_size: int | None = None) -> list[str]:
    """Sizes, batches, disk, the memory that is certain, and the weights also in LDM's units: a line each.

    The model knows what of it trains. `micro_batch_size`: what `auto` came to; None where it was not measured yet.
    """
    config = recipe.training
    loss = recipe.loss.resolved(config.total_images)
    sizes = {"encoder": _count(vae.encoder), "decoder": _count(vae.decoder)}
    with torch.device("meta"):
        critic = PatchDiscriminator(vae.config.in_channels, loss.discriminator) if loss.has_adversarial else None
    if critic is not None:
        sizes["discriminator"] = _count(critic)
    local = processes()
    is_open = config.micro_batch_size == "auto" and micro_batch_size is None
    micro_batch, accumulation = config.accumulation(local.num_processes, 1 if is_open else micro_batch_size)
    forwards = f"{accumulation} forwards x {micro_batch} images"
    if is_open:
        forwards = "as many forwards as the memory asks for (micro_batch_size is auto: measured when the run starts)"
    width = 8 if config.parameter_dtype == "float64" else 4
    total = _count(vae) + sizes.get("discriminator", 0)
    trained = sum(p.numel() for p in vae.parameters() if p.requires_grad) + sizes.get("discriminator", 0)
    average = _count(vae) if config.ema_decay else 0
    state = width * (total + 3 * trained + average)  # weights, gradients and AdamW's two moments; the average
    checkpoint = width * (total + 2 * trained + average)
    factor, latents = vae.downsample_factor, vae.config.latent_channels
    side = recipe.data.resolution / factor
    ratio = recipe.data.resolution**2 * vae.config.in_channels / (side**2 * latents)
    published = to_ldm_units(
        LossWeights(loss.perceptual_weight, loss.kl_weight, loss.adaptive_max),
        downsample_factor=factor,
        latent_channels=latents,
        resolution=recipe.data.resolution,
        channels=vae.config.in_channels,
    )
    steps = -(-config.total_images // config.global_batch_size)
    lines = [
        f"model       {', '.join(f'{name} {count / 1e6:.2f} M' for name, count in sizes.items())} parameters; "
        f"f{factor}c{latents}, {ratio:.0f} times fewer latent values than pixel values",
        f"batch       {config.global_batch_size} images a step = {local.num_processes} processes x {forwards}",
        f"length      {config.total_images} images = {steps} steps"
        + (f", or {config.max_minutes:g} minutes" if config.max_minutes else ""),
        f"precision   {resolve_precision(config, local.device)} autocast, {config.parameter_dtype} weights",
        f"disk        {checkpoint / 2**20:.0f} MiB a checkpoint, up to {config.keep_checkpoints + 1} at a time",
        f"memory      {state / 2**20:.0f} MiB a process for weights, gradients, optimizer and average; activations and "
        "the LPIPS network come on top",
        f"loss        kl_weight {loss.kl_weight:g} (in LDM's sum units {published.kl_weight:.3g}), perceptual_weight "
        f"{loss.perceptual_weight:g}, adaptive_max {loss.adaptive_max:g} (LDM: {published.adaptive_max:.3g})",
    ]
    if loss.has_adversarial:
        lines.append(
            f"adversarial trained from image {loss.discriminator_start}, felt by the decoder from "
            f"{loss.adversarial_start}"
        )
    return lines


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
