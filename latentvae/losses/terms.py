"""The loss terms as pure functions: every one returns one value per image, so that weights mean the same at any size.

B images of C channels and H x W pixels; c latent channels of h x w. Results are float32 or wider, shape (B,).
"""

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


def kl(moments: Tensor) -> Tensor:
    """KL divergence of the posterior from N(0, 1), nats, mean over the latent elements.

    moments (B, 2c, h, w) => (B,), Kingma & Welling 2014, appendix B.
    """
    num_elements = moments[0].numel() // 2
    return Posterior(widened(moments)).kl() / num_elements


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
