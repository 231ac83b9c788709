"""A posterior of one fixed standard deviation, made so that every user of the weights sees it."""

import math

import torch
from torch import Tensor

from latentvae.errors import UserError
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.model.posterior import LOGVAR_RANGE


def fix_posterior(vae: AutoencoderKL, sigma: float) -> None:
    """From now on the posterior has standard deviation `sigma` in every element, whatever trains.

    The channels of the last layer before the moments (quant_conv, or the encoder's conv_out) that give the log variance
    get weight 0 and bias 2 log sigma, and their gradients become 0. AdamW then leaves them bit for bit: its moments
    stay 0, a decay of 0 is 0, and biases are not decayed. An average over equal weights is equal to them.

    Call it again after a model was built and loaded; it is harmless where the weights are fixed already.

    Raises:
        UserError: `sigma` lies outside what a posterior can say.
    """
    logvar = 2 * math.log(sigma)
    if not LOGVAR_RANGE[0] < logvar < LOGVAR_RANGE[1]:
        low, high = (math.exp(bound / 2) for bound in LOGVAR_RANGE)
        raise UserError(f"training.posterior_sigma is {sigma:g}; give a value between {low:.1g} and {high:.1g}")
    layer = vae.encoder.conv_out if vae.quant_conv is None else vae.quant_conv
    channels = layer.out_channels // 2  # the means; the log variances follow
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    with torch.no_grad():
        weight[channels:] = 0
        bias[channels:] = logvar

    def means_only(gradient: Tensor) -> Tensor:
        kept = gradient.clone()
        kept[channels:] = 0  # not multiplied: an infinite gradient would become NaN
        return kept

    for parameter in (weight, bias):
        if parameter.requires_grad:
            parameter.register_hook(means_only)
