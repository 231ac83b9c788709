"""Pairs of our class and diffusers' own with the same lively weights."""

import diffusers
import torch

from latentvae.model.autoencoder import AutoencoderKL

# The configurations of the released models at an eighth of their width; what is not named is diffusers' default.
_SD = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 64, 64),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "sample_size": 64,
}
_NO_QUANT = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
RELEASED = {
    "sd1": _SD | {"scaling_factor": 0.18215},
    "sdxl": _SD | {"scaling_factor": 0.13025, "force_upcast": True},
    "sd3": _SD | _NO_QUANT | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    "flux1": _SD | _NO_QUANT | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
}
TINY = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
}


def enliven(vae, seed=0):
    """Draw weights under which every part matters: norms that scale and shift, attention that is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(noise * 0.3 + (1.0 if name.endswith("weight") else 0.0))
            elif parameter.ndim > 1:
                peaky = 1.5 if "to_q" in name or "to_k" in name else 1.0
                parameter.copy_(noise * peaky / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(noise * 0.1)
    return vae


def make_pair(config):
    """(ours, diffusers') with equal weights, in eval mode."""
    ours = enliven(AutoencoderKL(**config)).eval()
    theirs = diffusers.AutoencoderKL(**config).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def relative(a, b):
    """|a - b| / |b|."""
    return (torch.linalg.vector_norm((a - b).double()) / torch.linalg.vector_norm(b.double())).item()


def noise_images(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
