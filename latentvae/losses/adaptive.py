"""The weight of the adversarial term that balances it against the reconstruction at the last layer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight


def adaptive_weight(
    likelihood_gradient: Tensor,
    adversarial_gradient: Tensor,
    features: Tensor,
    last_layer: nn.Conv2d,
    average: Callable[[Tensor], Tensor],
    *,
    eps: float,
    maximum: float,
) -> Tensor:
    """|d likelihood / d w| / (|d adversarial / d w| + eps), at most `maximum`; w: weights of the last layer. => 0-dim

    Esser et al. 2021 (VQGAN), eq. 7. Both weight gradients follow from the layer's input and the gradients at its
    output, so no backward through the network is needed; they are computed by one convolution.

    Args:
        likelihood_gradient, adversarial_gradient: at the layer's output, (B, C, H, W), of means over the batch.
        features: the layer's input, (B, C0, H, W).
        average: mean over processes of a small tensor.
    """
    if last_layer.padding_mode != "zeros" or isinstance(last_layer.padding, str) or last_layer.groups != 1:
        raise ValueError(f"the adaptive weight knows plain zero-padded convolutions, not {last_layer}")
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        stacked = torch.cat([likelihood_gradient, adversarial_gradient], dim=1)  # (B, 2C, H, W)
        channels, *kernel = last_layer.weight.shape
        gradients = average(
            conv2d_weight(
                features.detach().to(stacked.dtype),
                torch.Size([2 * channels, *kernel]),
                stacked,
                stride=last_layer.stride,
                padding=last_layer.padding,
                dilation=last_layer.dilation,
            )
        )
        likelihood_norm, adversarial_norm = (half.norm() for half in gradients.chunk(2))
        return (likelihood_norm / (adversarial_norm + eps)).clamp(0, maximum)
