"""How errors become the negative log-likelihood of an image given its latent, one value per image.

"Per pixel element" is per number of the image, C H W of them. B images.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

LOGVAR_LIMIT = 12.0  # exp(-12) = 6e-6 is the variance of the rounding to 8 bits on [-1, 1], (2 / 255)^2 / 12 = 5e-6
ROUNDING = 2 / 255  # one step of 8 bits on [-1, 1]

PixelTerm = Literal["l1", "l2", "charbonnier"]


class LearnedLogvar(nn.Module):
    """One learned log variance of all images (the `logvar` of LDM's loss, which SGM trains); it starts at 0.

    `forward()` => a 0-dim tensor in (-12, 12), close to the parameter where that is small. It is bounded, since the
    loss falls with it for as long as reconstructions improve, and its gradient is above 0 everywhere, so that it never
    sticks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.logvar = nn.Parameter(torch.zeros(()))

    def forward(self) -> Tensor:
        width = 2 * LOGVAR_LIMIT / math.pi
        return width * torch.atan(self.logvar / width)


def learned_nll(errors: Tensor, logvar: Tensor) -> Tensor:
    """errors / exp(logvar) + logvar: (B,) weighted mean errors and a 0-dim log variance => (B,).

    LDM's `nll_loss` per pixel element (Rombach et al. 2022, `contperceptual.py`): for L1 the Laplace density of scale
    exp(logvar) without its log 2; for L2 twice the Gaussian one of variance exp(logvar) without its log 2 pi. An
    evidence bound has kl_weight = latent elements / pixel elements with L1 (f8c4: 0.021), and twice that with L2.
    """
    return errors * (-logvar).exp() + logvar


def optimal_nll(pixel: Tensor, kind: PixelTerm) -> Tensor:
    """Negative log-likelihood per pixel element under the scale that fits each image best: (B,) => (B,).

    Rybkin et al. 2021, "Simple and Effective VAE Training with Calibrated Decoders" (sigma-VAE): the best variance of a
    Gaussian is the mean squared error, which leaves 0.5 log(MSE) and constants; the best scale of a Laplace density is
    the mean absolute error, which leaves log(L1). Charbonnier counts as the L1 that it is above its eps. One scale per
    image, so that micro-batches and processes add up. The constants are left out. kl_weight = latent elements / pixel
    elements makes it an evidence bound.
    """
    half = 0.5 if kind == "l2" else 1.0
    return half * optimal_logvar(pixel, kind)


def optimal_logvar(pixel: Tensor, kind: PixelTerm) -> Tensor:
    """Log of the best variance (L2) or scale (L1, Charbonnier) of each image: its mean error (B,) => (B,).

    The error that rounding to 8 bits would make is added, so that a perfect reconstruction has a finite likelihood and
    no gradient is spent on what no 8-bit image can show.
    """
    rounding = ROUNDING**2 / 12 if kind == "l2" else ROUNDING / 4  # mean square and mean size of a uniform error
    return (pixel + rounding).log()
