"""One forward of the autoencoder as one module, so that whatever wraps it (DistributedDataParallel) sees every call.

B images of C channels and H x W pixels; c latent channels of h x w; C0 channels before the last convolution.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from latentvae.losses.terms import widened
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.model.posterior import Posterior


class StepOutput(NamedTuple):
    """Plain tensors, which every wrapper can carry; the posterior object is built outside from `moments`."""

    moments: Tensor  # (B, 2c, h, w), float32 or wider
    reconstructions: Tensor  # (B, C, H, W), in the dtype that the network ran in; may overshoot [-1, 1]
    features: Tensor  # (B, C0, H, W), the input of the last convolution; detached, only its values are needed


class AutoencoderStep(nn.Module):
    """images [-1, 1] and noise N(0, 1) => moments, reconstruction of one posterior sample, last features.

    With `train_encoder=False` encoder and quant_conv run without gradients; which parameters train is otherwise decided
    by their `requires_grad`.
    """

    def __init__(self, vae: AutoencoderKL, train_encoder: bool = True) -> None:
        super().__init__()
        self.vae = vae
        self.train_encoder = train_encoder

    def forward(self, images: Tensor, noise: Tensor) -> StepOutput:
        """images (B, C, H, W), noise (B, c, h, w). Zero noise decodes the posterior's mode."""
        with torch.set_grad_enabled(self.train_encoder and torch.is_grad_enabled()):
            moments = widened(self.vae.moments(images))  # half precision would coarsen the sample and the KL term
            posterior = Posterior(moments)
            if noise.shape != posterior.mean.shape:
                raise ValueError(f"noise is {tuple(noise.shape)}; the latents are {tuple(posterior.mean.shape)}")
            latents = posterior.mean + posterior.std * noise.to(moments.dtype)  # (B, c, h, w)
        if self.vae.post_quant_conv is not None:
            latents = self.vae.post_quant_conv(latents)
        features = self.vae.decoder.features(latents)
        return StepOutput(moments, self.vae.decoder.conv_out(features), features.detach())
