"""The diagonal Gaussian over latents that an encoder gives."""

import math

import torch
from torch import Tensor

LOGVAR_RANGE = (-30.0, 20.0)  # as in LDM: a deviation between 3e-7 and 2e4


class Posterior:
    """q(latents | image) = N(mean, exp(logvar)), independent per element.

    Letters in shapes: B images, D latent channels, h x w positions. Everything keeps the dtype of `moments`.
    """

    def __init__(self, moments: Tensor) -> None:
        """`moments`: (B, 2D, h, w), the mean in the first D channels and the log variance in the others."""
        if moments.ndim != 4 or moments.shape[1] % 2:
            raise ValueError(f"moments have shape {tuple(moments.shape)}: (B, 2D, h, w) is needed")
        self.mean, logvar = moments.chunk(2, dim=1)  # (B, D, h, w) each
        self.logvar = logvar.clamp(*LOGVAR_RANGE)

    @property
    def std(self) -> Tensor:
        """Standard deviation, (B, D, h, w)."""
        return torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        """Variance, (B, D, h, w)."""
        return torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * noise, (B, D, h, w).

        With a generator the noise is drawn on its device: a CPU generator gives the same noise whatever the device.
        """
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)

    def mode(self) -> Tensor:
        """The most likely latents, (B, D, h, w)."""
        return self.mean

    def kl(self, other: "Posterior | None" = None) -> Tensor:
        """KL(self || other), or against the standard normal: (B,) in nats, summed over each image's elements.

        Kingma and Welling 2013, appendix B, and its form for two Gaussians.
        """
        if other is None:
            elements = self.mean.square() + self.var - 1 - self.logvar
        else:
            log_ratio = self.logvar - other.logvar
            elements = (self.mean - other.mean).square() / other.var + log_ratio.exp() - 1 - log_ratio
        return 0.5 * elements.sum(dim=(1, 2, 3))

    def nll(self, latents: Tensor) -> Tensor:
        """-log q(latents): (B,) in nats, summed over each image's elements."""
        elements = math.log(2 * math.pi) + self.logvar + (latents - self.mean).square() / self.var
        return 0.5 * elements.sum(dim=(1, 2, 3))
