"""SSIM as a loss term: how alike two pictures are in brightness, contrast and structure, window by window.

B images of C channels and H x W pixels.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentvae.errors import UserError
from latentvae.losses.terms import widened

WINDOW = 11  # pixels; this and the next three: Wang et al. 2004, section III.B and III.C
SIGMA = 1.5  # pixels
K1, K2 = 0.01, 0.03
DATA_RANGE = 2.0  # of pixels in [-1, 1]


def _gaussian() -> tuple[float, ...]:
    """Weights of the window along one side, which sum to 1."""
    values = [math.exp(-0.5 * ((i - WINDOW // 2) / SIGMA) ** 2) for i in range(WINDOW)]
    return tuple(value / sum(values) for value in values)


GAUSSIAN = _gaussian()


def check_window(side: int) -> None:
    """Raise a UserError where images of this shorter side, in pixels, are smaller than the window."""
    if side < WINDOW:
        raise UserError(
            f"images have {side} pixels a side; SSIM looks through windows of {WINDOW}: raise data.resolution or set "
            "loss.ssim_weight=0"
        )


class _WindowMeans(torch.autograd.Function):
    """Gaussian means of all windows that lie inside: (..., H, W) => (..., H - 10, W - 10).

    Sums of shifted copies instead of a convolution: a variance is a small difference of two such means, which the
    ten-bit mantissa of TF32 or of autocast would destroy. The window is symmetric, so the backward pass is the same sum
    over the gradient with zeros around it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        for dim in (-2, -1):
            size = x.shape[dim] - WINDOW + 1
            means = x.narrow(dim, 0, size) * GAUSSIAN[0]
            for offset in range(1, WINDOW):
                means.add_(x.narrow(dim, offset, size), alpha=GAUSSIAN[offset])
            x = means
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        means: Tensor = _WindowMeans.apply(F.pad(gradients[0], [WINDOW - 1] * 4))
        return means


def ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Structural similarity per image: pixels in [-1, 1], (B, C, H, W) twice => (B,), in [-1, 1]; identical: 1.

    Wang et al. 2004, eq. 13, mean over channels and over the windows that lie inside the image (no padding). Pixels are
    moved to [0, 2] first: the term for brightness knows black as 0, and the result is then the SSIM of the pictures as
    they are shown (skimage's or torchmetrics' on [0, 1] with data range 1).

    Raises UserError for images smaller than the window.
    """
    if images.shape != reconstructions.shape:
        raise ValueError(f"images are {tuple(images.shape)}, reconstructions {tuple(reconstructions.shape)}")
    check_window(min(images.shape[2:]))
    x, y = widened(images) + 1, widened(reconstructions) + 1
    means: Tensor = _WindowMeans.apply(torch.stack([x, y, x * x + y * y, x * y]))  # (4, B, C, H', W')
    mean_x, mean_y, squares, product = means.unbind()
    c1, c2 = (K1 * DATA_RANGE) ** 2, (K2 * DATA_RANGE) ** 2
    brightness = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    variances, covariance = squares - mean_x.square() - mean_y.square(), product - mean_x * mean_y
    structure = (2 * covariance + c2) / (variances + c2)
    return (brightness * structure).flatten(1).mean(1)
