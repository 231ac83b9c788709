"""A tiny random model of every supported class, in which every part matters."""

import diffusers
import torch

from latentvae.autoencoders.tiny import AutoencoderTinyPool
from tests.model.pairs import RELEASED, enliven

_KL = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
_TINY = {
    "encoder_block_out_channels": (8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8),
    "num_encoder_blocks": (1, 1, 2),
    "num_decoder_blocks": (2, 1, 1),
    "latent_channels": 5,
}
_CAUSAL = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2], "num_res_blocks": 1, "temperal_downsample": [False, True]}
_STATISTICS = {"latents_mean": [0.5, -1.25, 0.1, 2.0], "latents_std": [0.7, 1.9, 2.4, 0.35]}
MODELS = {
    **{name: ("AutoencoderKL", config) for name, config in RELEASED.items()},
    "sdxl-statistics": ("AutoencoderKL", RELEASED["sdxl"] | _STATISTICS),
    "flux2": ("AutoencoderKLFlux2", _KL | {"latent_channels": 3, "batch_norm_eps": 0.3, "sample_size": 16}),
    "asymmetric": (
        "AsymmetricAutoencoderKL",
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "down_block_out_channels": (8, 16),
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "up_block_out_channels": (16, 24),
            "layers_per_up_block": 2,
            "norm_num_groups": 4,
            "latent_channels": 5,
            "scaling_factor": 0.31,
        },
    ),
    "tiny": ("AutoencoderTiny", _TINY | {"scaling_factor": 1.7, "shift_factor": 0.3}),
    "tiny-pool": ("AutoencoderTinyPool", _TINY),
    "dc": (
        "AutoencoderDC",
        {
            "latent_channels": 6,
            "attention_head_dim": 4,
            "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "encoder_block_out_channels": (12, 24),
            "decoder_block_out_channels": (12, 24),
            "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": (1, 1),
            "encoder_qkv_multiscales": ((), (5,)),
            "decoder_qkv_multiscales": ((), (5,)),
            "decoder_norm_types": ("rms_norm", "rms_norm"),
            "decoder_act_fns": ("silu", "silu"),
            "scaling_factor": 0.41407,
        },
    ),
    "qwen-image": ("AutoencoderKLQwenImage", _CAUSAL | _STATISTICS),
    "wan": ("AutoencoderKLWan", _CAUSAL | _STATISTICS),
    "wan2.2": (
        "AutoencoderKLWan",
        _CAUSAL
        | _STATISTICS
        | {"in_channels": 12, "out_channels": 12, "patch_size": 2, "is_residual": True, "decoder_base_dim": 16}
        | {"scale_factor_spatial": 8},
    ),
}
FACTORS = {"flux2": 2, "asymmetric": 2, "tiny": 4, "tiny-pool": 4, "dc": 2, "qwen-image": 4, "wan": 4, "wan2.2": 8}


def make_model(name, seed=0):
    """The plain diffusers model, float32, in eval mode."""
    class_name, config = MODELS[name]
    loader = AutoencoderTinyPool if class_name == "AutoencoderTinyPool" else getattr(diffusers, class_name)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = enliven(loader(**config), seed).eval()
    if name == "flux2":
        generator = torch.Generator().manual_seed(seed)
        channels = len(model.bn.running_mean)
        model.bn.running_mean.copy_(torch.randn(channels, generator=generator))
        model.bn.running_var.copy_(torch.rand(channels, generator=generator) * 3 + 0.05)
    return model


def factor(name):
    """Pixels per latent position along a side."""
    return FACTORS.get(name, 8)
