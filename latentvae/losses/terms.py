"""The loss terms as pure functions: every one returns one value per image, so that weights mean the same at any size.

B images of C channels and H x W pixels; c latent channels of h x w. Results are float32 or wider, shape (B,).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from latentvae.model.posterior import Posterior


def widened(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged where it is wider: half precision loses a loss of 1e-4 among terms of 1."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _per_image(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)  # (B, ...) -> (B,)


def _check_pair(images: Tensor, reconstructions: Tensor) -> None:
    if images.shape != reconstructions.shape:  # broadcasting would compare the wrong pixels without a word
        raise ValueError(f"images are {tuple(images.shape)}, reconstructions {tuple(reconstructions.shape)}")


def l1(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean absolute error per image: (B, C, H, W) twice => (B,)."""
    _check_pair(images, reconstructions)
    return _per_image((widened(images) - widened(reconstructions)).abs())


def l2(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean squared error per image: (B, C, H, W) twice => (B,)."""
    _check_pair(images, reconstructions)
    return _per_image((widened(images) - widened(reconstructions)).square())


def charbonnier(images: Tensor, reconstructions: Tensor, eps: float) -> Tensor:
    """Mean of sqrt(error^2 + eps^2) - eps per image: (B, C, H, W) twice => (B,).

    Charbonnier et al. 1994; Lai et al. 2017 (LapSRN) use it with eps 1e-3. Taking eps off changes no gradient and makes
    identical images cost 0. An error far below `eps` costs error^2 / (2 eps), one far above it its size, as in L1.
    """
    _check_pair(images, reconstructions)
    squares = (widened(images) - widened(reconstructions)).square()
    return _per_image(
        squares / ((squares + eps**2).sqrt() + eps)
    )  # the same without the loss of digits at small errors


def kl(moments: Tensor, free_bits: float = 0.0) -> Tensor:
    """KL divergence of the posterior from N(0, 1), nats per latent element: moments (B, 2c, h, w) => (B,).

    Kingma & Welling 2014, appendix B. With `free_bits` each channel of an image counts as max(free_bits, its mean over
    the positions), so a channel that carries less is not pressed further (Kingma et al. 2016, section 2.3 and
    appendix C.8). They take the mean over the mini-batch inside the maximum; here it stays per image, so that
    micro-batches and processes add up to the loss of the whole batch.
    """
    moments = widened(moments)
    if not free_bits:
        return Posterior(moments).kl() / (moments[0].numel() // 2)
    mean, logvar = moments.chunk(2, 1)  # (B, c, h, w) each
    batch, channels, height, width = mean.shape
    channels_as_images = torch.stack([mean, logvar], 2).flatten(0, 1)  # (B c, 2, h, w)
    of_channels = Posterior(channels_as_images).kl().view(batch, channels) / (height * width)  # (B, c)
    return of_channels.clamp_min(free_bits).mean(1)


def anchor_distance(moments: Tensor, anchor: Tensor, latent_scale: float | Sequence[float] = 1.0) -> Tensor:
    """Mean square of (posterior mean - anchor) * latent_scale per image.

    moments (B, 2c, h, w) and the starting encoder's posterior means (B, c, h, w), both raw => (B,). `latent_scale` is
    the model's scaling factor: the distance is then that of the latents which a diffusion model sees.
    """
    mean = widened(moments).chunk(2, 1)[0]  # (B, c, h, w)
    if mean.shape != anchor.shape:
        raise ValueError(f"posterior means are {tuple(mean.shape)}, those of the anchor {tuple(anchor.shape)}")
    scale = torch.as_tensor(latent_scale, dtype=mean.dtype, device=mean.device).view(-1, 1, 1)  # (1 or c, 1, 1)
    return _per_image(((mean - widened(anchor)) * scale).square())


def hinge_generator(logits: Tensor) -> Tensor:
    """What the generator minimises: minus the discriminator's mean logit. logits (B, 1, h', w') => (B,).

    Lim & Ye 2017, "Geometric GAN", eq. 12.
    """
    return -_per_image(widened(logits))


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """What the discriminator minimises: 0.5 (relu(1 - real) + relu(1 + fake)). Logits (B, 1, h', w') twice => (B,).

    Lim & Ye 2017, eq. 11; the factor 0.5 is that of taming-transformers.
    """
    return 0.5 * (_per_image(F.relu(1 - widened(real))) + _per_image(F.relu(1 + widened(fake))))


def non_saturating_generator(logits: Tensor) -> Tensor:
    """What the generator minimises: -log sigmoid(logit), mean over the patches. logits (B, 1, h', w') => (B,).

    Goodfellow et al. 2014, section 3: its gradient stays strong where the discriminator is sure of a fake.
    """
    return _per_image(F.softplus(-widened(logits)))


def non_saturating_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Cross-entropy of real and fake, half of their sum. Logits (B, 1, h', w') twice => (B,).

    Goodfellow et al. 2014, eq. 1; the factor 0.5 is that of the hinge loss above. An undecided one costs log 2.
    """
    return 0.5 * (_per_image(F.softplus(-widened(real))) + _per_image(F.softplus(widened(fake))))


@dataclass(frozen=True)
class LDMWeights:
    """Loss weights as the LDM family publishes them: reconstruction and KL summed over their elements."""

    perceptual_weight: float = 1.0
    kl_weight: float = 1e-6  # configs/autoencoder/*.yaml of latent-diffusion
    adaptive_max: float = 1e4  # the clamp of calculate_adaptive_weight


@dataclass(frozen=True)
class LossWeights:
    """The same weights in our units, where every term is the mean over its own elements."""

    perceptual_weight: float
    kl_weight: float
    adaptive_max: float


def _unit_factors(downsample_factor: int, latent_channels: int, resolution: int, channels: int) -> tuple[float, float]:
    # Dividing LDM's whole loss by the number of pixel values N leaves the means of the pixel terms, turns the KL sum
    # over n latents into (n / N) times its mean, and the weight of the adversarial term, a mean already, into 1 / N.
    return latent_channels / (channels * downsample_factor**2), 1 / (channels * resolution**2)


def from_ldm_units(
    weights: LDMWeights, *, downsample_factor: int, latent_channels: int, resolution: int, channels: int = 3
) -> LossWeights:
    """Published sum-convention weights => ours. LPIPS is broadcast over the pixels there, so its weight is unchanged.

    `resolution` is the side of the (square) training crop in pixels: LDM's clamp depends on it, ours does not.
    """
    kl_factor, adaptive_factor = _unit_factors(downsample_factor, latent_channels, resolution, channels)
    return LossWeights(weights.perceptual_weight, weights.kl_weight * kl_factor, weights.adaptive_max * adaptive_factor)


def to_ldm_units(
    weights: LossWeights, *, downsample_factor: int, latent_channels: int, resolution: int, channels: int = 3
) -> LDMWeights:
    """Our weights => what an LDM config would say for the same training; the inverse of `from_ldm_units`."""
    kl_factor, adaptive_factor = _unit_factors(downsample_factor, latent_channels, resolution, channels)
    return LDMWeights(weights.perceptual_weight, weights.kl_weight / kl_factor, weights.adaptive_max / adaptive_factor)
