"""How close reconstructions are, per image."""

import torch
from torch import Tensor


def psnr(images: Tensor, reconstructions: Tensor, *, data_range: float = 255.0) -> Tensor:
    """Peak signal-to-noise ratio of each image, 10 log10(data_range^2 / mean squared error).

    Args:
        images: (B, ...) in the pixel range of the data, as integers or floats.
        reconstructions: the same shape and range; clamp and round to integers first where the data are integers.
        data_range: largest possible difference of two pixels; 255 for uint8.

    Returns:
        (B,) float64 in dB; infinity where an image is reproduced exactly.
    """
    if images.shape != reconstructions.shape:
        raise ValueError(f"images are {tuple(images.shape)}, reconstructions {tuple(reconstructions.shape)}")
    difference = images.to(torch.float64) - reconstructions.to(torch.float64)
    mean_squared_error = difference.square().flatten(1).mean(1)
    return 10 * torch.log10(data_range**2 / mean_squared_error)
