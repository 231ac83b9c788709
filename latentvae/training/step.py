"""One forward of the autoencoder as one module, so that whatever wraps it (DistributedDataParallel) sees every call.

B images of C channels and H x W pixels; c latent channels of h x w; C0 channels before the last convolution. Where the
latents are transformed, their decoding is of H' x W'; else H' x W' is H x W.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from latentvae.losses.terms import widened
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.model.posterior import Posterior
from latentvae.training.perturbation import LatentNoise, Transform


class StepOutput(NamedTuple):
    """Plain tensors, which every wrapper can carry; the posterior object is built outside from `moments`."""

    moments: Tensor  # (B, 2c, h, w), float32 or wider, of the images as they are
    reconstructions: Tensor  # (B, C, H', W'), in the dtype that the network ran in; may overshoot [-1, 1]
    features: Tensor  # (B, C0, H', W'), the input of the last convolution; detached, only its values are needed
    logvar: Tensor | None  # (), what `likelihood` gives


class AutoencoderStep(nn.Module):
    """images [-1, 1] and noise N(0, 1) => moments, reconstruction of one posterior sample, last features.

    Which parameters train is decided by their `requires_grad` at each call: with none in encoder and quant_conv, these
    run without gradients. `likelihood` is a module without input whose output is a trained log variance; it is here so
    that its gradient is averaged as every other.
    """

    def __init__(self, vae: AutoencoderKL, likelihood: nn.Module | None = None) -> None:
        super().__init__()
        self.vae = vae
        self.likelihood = likelihood

    def forward(
        self,
        images: Tensor,
        noise: Tensor,
        transform: Transform | None = None,
        latent_noise: LatentNoise | None = None,
    ) -> StepOutput:
        """images (B, C, H, W), noise (B, c, h, w). Zero noise decodes the posterior's mode.

        The decoder gets the sample, transformed and then mixed with `latent_noise`, where these are given.
        """
        with torch.set_grad_enabled(self.trains_encoder() and torch.is_grad_enabled()):
            moments = widened(self.vae.moments(images))  # half precision would coarsen the sample and the KL term
            posterior = Posterior(moments)
            if noise.shape != posterior.mean.shape:
                raise ValueError(f"noise is {tuple(noise.shape)}; the latents are {tuple(posterior.mean.shape)}")
            latents = posterior.mean + posterior.std * noise.to(moments.dtype)  # (B, c, h, w)
            if transform is not None:
                latents = transform.latents(latents)  # (B, c, h', w')
            if latent_noise is not None:
                latents = latent_noise(latents)
        if self.vae.post_quant_conv is not None:
            latents = self.vae.post_quant_conv(latents)
        features = self.vae.decoder.features(latents)
        logvar = None if self.likelihood is None else self.likelihood()
        return StepOutput(moments, self.vae.decoder.conv_out(features), features.detach(), logvar)

    def trains_encoder(self) -> bool:
        """Whether anything before the latents takes a gradient."""
        return any(parameter.requires_grad for part in encoder_parts(self.vae) for parameter in part.parameters())


def encoder_parts(vae: AutoencoderKL) -> list[nn.Module]:
    """The modules before the latents: encoder and, where there is one, quant_conv."""
    return [part for part in (vae.encoder, vae.quant_conv) if part is not None]
