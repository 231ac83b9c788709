"""What is done to latents between encoder and decoder, so that they become easier to diffuse.

Equivariance (EQ-VAE, Kouzelis et al. 2025, arXiv 2502.09509): the decoder is given a shrunk and turned latent, and its
picture is compared with the image shrunk and turned alike. Latent noise (l-DeTok, Yang et al. 2025, arXiv 2507.15856):
the decoder is given a mixture of latent and noise. Everything is drawn from the seed and the place in the run.

B images of C channels and H x W = fh x fw pixels; latents of c channels and h x w.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from latentvae.errors import UserError
from latentvae.keyed import keyed_noise, uniforms
from latentvae.losses.config import LossConfig
from latentvae.losses.perceptual import MINIMUM_SIZE
from latentvae.losses.structural import WINDOW
from latentvae.losses.terms import l2
from latentvae.model.posterior import Posterior

FULL_SCALE = 32  # sizes are counted in 32nds (EQ-VAE)


@dataclass(frozen=True)
class Transform:
    """Resize to `scale` / 32 of the size, then turn counter-clockwise by `turns` quarters; latents and images alike.

    Bilinear with antialiasing, for latents and images. EQ-VAE's own code goes without: it then asks for pictures whose
    pixels between the sampled ones are lost, which nobody will ask of the decoder of a diffusion model.
    """

    scale: int = FULL_SCALE
    turns: int = 0

    def latents(self, latents: Tensor) -> Tensor:
        """(B, c, h, w) => (B, c, h', w'), turned: h' = scale h / 32 rounded, at least 1; w' alike."""
        return self._apply(latents, 1)

    def images(self, images: Tensor, downsample_factor: int) -> Tensor:
        """(B, C, fh, fw) => (B, C, fh', fw'), turned: the size that the transformed latents decode to."""
        return self._apply(images, downsample_factor)

    def side(self, latent_side: int) -> int:
        """h => h'."""
        return max(1, (latent_side * self.scale + FULL_SCALE // 2) // FULL_SCALE)

    def _apply(self, x: Tensor, unit: int) -> Tensor:
        size = (self.side(x.shape[2] // unit) * unit, self.side(x.shape[3] // unit) * unit)
        if size != tuple(x.shape[2:]):
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)
        return torch.rot90(x, self.turns, (2, 3)) if self.turns else x


def draw_transform(
    config: LossConfig, *, seed: int, images_seen: int, latent_size: Sequence[int], downsample_factor: int
) -> Transform | None:
    """The transformation of one optimizer step, or None: with probability `equivariance` one, as in EQ-VAE.

    The same on every process and for every micro-batch of one size, since it depends on `seed` and `images_seen`.
    `latent_size` (h, w) limits how small it may become: the loss has terms that need some pixels.

    Raises:
        UserError: no scale of `equivariance_scales` leaves enough pixels.
    """
    if config.equivariance == 0:
        return None
    smallest = smallest_scale(config, latent_side=min(latent_size), downsample_factor=downsample_factor)
    is_due, at_scale, at_turn, _ = uniforms("equivariance", seed, images_seen)
    if is_due >= config.equivariance:
        return None
    scale = smallest + int(at_scale * (config.equivariance_scales[1] - smallest + 1))
    return Transform(scale, 1 + int(at_turn * 3) if config.equivariance_rotation else 0)


def smallest_scale(config: LossConfig, *, latent_side: int, downsample_factor: int) -> int:
    """The smallest scale of `equivariance_scales`, in 32nds, at which every term of the loss sees enough pixels.

    Raises:
        UserError: there is none.
    """
    low, high = config.equivariance_scales
    needed = minimum_side(config)
    for scale in range(low, high + 1):
        if Transform(scale).side(latent_side) * downsample_factor >= needed:
            return scale
    raise UserError(
        f"images of {latent_side * downsample_factor} pixels shrunk to {high}/{FULL_SCALE} are smaller than the "
        f"{needed} pixels that the loss needs: raise data.resolution, or set loss.equivariance=0"
    )


def minimum_side(config: LossConfig) -> int:
    """The smallest side in pixels of an image that every term of the loss can judge."""
    sides = [1]
    if config.has_perceptual:
        sides.append(MINIMUM_SIZE[config.perceptual])
    if config.has_adversarial:
        sides.append(config.discriminator.minimum_size)
    if config.ssim_weight > 0:
        sides.append(WINDOW)
    return max(sides)


@dataclass(frozen=True)
class LatentNoise:
    """z' = (1 - share) z + noise, per image."""

    share: Tensor  # (B,), t
    noise: Tensor  # (B, c, h, w), t gamma eps

    def __call__(self, latents: Tensor) -> Tensor:
        """(B, c, h, w) => the same shape."""
        return (1 - self.share.to(latents).view(-1, 1, 1, 1)) * latents + self.noise.to(latents)


def draw_latent_noise(gamma: float, shape: Sequence[int], *, seed: int, positions: Sequence[int]) -> LatentNoise:
    """t uniform in [0, 1) per image and eps ~ N(0, 1) (l-DeTok, section 3), decided by (seed, position) alone.

    `shape` (c, h, w) is that of the latents that the decoder gets. On the CPU, in float32.
    """
    shares = torch.tensor([uniforms("latent noise", seed, p)[0] for p in positions])
    noise = torch.stack([keyed_noise(shape, "latent noise", seed, position) for position in positions])
    return LatentNoise(shares, gamma * shares.view(-1, 1, 1, 1) * noise)


class _Autoencoder(Protocol):
    """What `equivariance_error` needs of a model."""

    @property
    def downsample_factor(self) -> int: ...
    def moments(self, images: Tensor) -> Tensor: ...
    def decode(self, latents: Tensor) -> Any: ...


ERROR_TRANSFORMS = (Transform(FULL_SCALE // 2), *(Transform(FULL_SCALE, turns) for turns in (1, 2, 3)))


def equivariance_error(vae: _Autoencoder, images: Tensor, transforms: Sequence[Transform] = ERROR_TRANSFORMS) -> Tensor:
    """How far decoding a transformed latent is from the transformed image: images [-1, 1] (B, C, H, W) => (B,), >= 0.

    The mean over `transforms` (half the size; each quarter turn) of the mean squared error between decode(T z) and T x,
    with z the posterior's mode: the quantity that EQ-VAE's training lowers. What the model loses without any
    transformation is part of it.
    """
    latents = Posterior(vae.moments(images)).mode()
    errors = [
        l2(transform.images(images, vae.downsample_factor), vae.decode(transform.latents(latents)).sample)
        for transform in transforms
    ]
    return torch.stack(errors).mean(0)
