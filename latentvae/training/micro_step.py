"""What one forward of the autoencoder is given, drawn from the seed and the places of its images in the run."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentvae.keyed import keyed_noise
from latentvae.losses.config import LossConfig
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.training.perturbation import LatentNoise, Transform, draw_latent_noise, draw_transform


@dataclass(frozen=True)
class StepInputs:
    """The inputs of `AutoencoderStep`, on the device, and what its reconstructions are compared with."""

    images: Tensor  # (B, C, H, W)
    noise: Tensor  # (B, c, h, w), N(0, 1)
    transform: Transform | None
    latent_noise: LatentNoise | None
    targets: Tensor  # (B, C, H', W'), the images, transformed as the latents are


@dataclass(frozen=True)
class StepDraws:
    """Draws the inputs of every forward of a run; any number of processes and any resume see the same.

    Posterior noise, and the noise mixed into the latents, are keyed by the place of an image in the global order; the
    transformation by the images seen before the step, so that a global batch shares it.
    """

    vae: AutoencoderKL
    loss: LossConfig
    seed: int

    def inputs(self, images: Tensor, positions: Sequence[int], images_seen: int, *, latent_noise: float) -> StepInputs:
        """For images [-1, 1] (B, C, H, W) on their device; `latent_noise` is the gamma of this step."""
        size = self._latent_size(images)
        transform = draw_transform(
            self.loss,
            seed=self.seed,
            images_seen=images_seen,
            latent_size=size,
            downsample_factor=self.vae.downsample_factor,
        )
        return self._inputs(images, positions, transform, latent_noise)

    def largest_inputs(self, images: Tensor, *, latent_noise: float) -> StepInputs:
        """Those that take the most memory: nothing is shrunk."""
        return self._inputs(images, range(len(images)), None, latent_noise)

    def _latent_size(self, images: Tensor) -> tuple[int, int]:
        factor = self.vae.downsample_factor
        return images.shape[2] // factor, images.shape[3] // factor

    def _inputs(
        self, images: Tensor, positions: Sequence[int], transform: Transform | None, gamma: float
    ) -> StepInputs:
        shape = (self.vae.config.latent_channels, *self._latent_size(images))
        noise = torch.stack([keyed_noise(shape, self.seed, position) for position in positions])
        targets, decoded = images, shape
        if transform is not None:
            targets = transform.images(images, self.vae.downsample_factor)
            if images.is_contiguous(memory_format=torch.channels_last):
                targets = targets.contiguous(memory_format=torch.channels_last)
            decoded = (shape[0], *self._latent_size(targets))
        mixed = None
        if gamma > 0:
            drawn = draw_latent_noise(gamma, decoded, seed=self.seed, positions=positions)
            mixed = LatentNoise(drawn.share.to(images.device), drawn.noise.to(images.device))
        return StepInputs(images, noise.to(images.device), transform, mixed, targets)
