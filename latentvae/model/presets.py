"""Architectures by name: `f<downsample>c<channels>`, each also `-small` (laptops) and `-tiny` (tests and the demo)."""

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field, model_validator

from latentvae.errors import UserError

# Block type in config.json -> has attention.
DOWN_BLOCK_TYPES = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
UP_BLOCK_TYPES = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
ACTIVATIONS = ("silu", "swish")  # two names of one function


def _preset(
    latent_channels: int,
    multipliers: tuple[int, ...],
    *,
    width: int,
    num_groups: int,
    layers: int = 2,
    num_attention: int = 0,
    mid_attention: bool = True,
    sample_size: int = 256,
    like_flux: bool = False,
) -> dict[str, Any]:
    """The fields of config.json. `num_attention`: how many of the lowest resolutions have attention in every layer.

    An untrained model has no latent statistics yet: its scaling_factor is 1 until the trainer writes the measured one.
    `like_flux`: SD3 and FLUX pipelines want no quant convs and fail on a null shift_factor, so it starts at 0.
    """
    num_plain = len(multipliers) - num_attention
    return {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * num_plain + ["AttnDownEncoderBlock2D"] * num_attention,
        "up_block_types": ["AttnUpDecoderBlock2D"] * num_attention + ["UpDecoderBlock2D"] * num_plain,
        "block_out_channels": [width * multiplier for multiplier in multipliers],
        "layers_per_block": layers,
        "act_fn": "silu",
        "latent_channels": latent_channels,
        "norm_num_groups": num_groups,
        "sample_size": sample_size,
        "scaling_factor": 1.0,
        "shift_factor": 0.0 if like_flux else None,
        "latents_mean": None,
        "latents_std": None,
        "force_upcast": True,
        "use_quant_conv": not like_flux,
        "use_post_quant_conv": not like_flux,
        "mid_block_add_attention": mid_attention,
    }


# What makes each family: multipliers and attention of the LDM configs autoencoder_kl_64x64x3, 32x32x4, 16x16x16 and
# 8x8x64; f8c16 after FLUX.1's config; f16c32 after LightningDiT's f16d32.
_FAMILIES: dict[str, dict[str, Any]] = {
    "f4c3": {"latent_channels": 3, "multipliers": (1, 2, 4)},
    "f8c4": {"latent_channels": 4, "multipliers": (1, 2, 4, 4)},
    "f8c16": {"latent_channels": 16, "multipliers": (1, 2, 4, 4), "like_flux": True},
    "f16c16": {"latent_channels": 16, "multipliers": (1, 1, 2, 2, 4), "num_attention": 1, "sample_size": 512},
    "f16c32": {"latent_channels": 32, "multipliers": (1, 1, 2, 2, 4), "num_attention": 1, "sample_size": 512},
    "f32c64": {"latent_channels": 64, "multipliers": (1, 1, 2, 2, 4, 4), "num_attention": 2, "sample_size": 512},
}
# One channel per group would erase channel means and leave convolution biases without a gradient: 4 at least.
_SIZES: dict[str, dict[str, Any]] = {
    "": {"width": 128, "num_groups": 32},
    "-small": {"width": 32, "num_groups": 8},
    "-tiny": {"width": 24, "num_groups": 6, "layers": 1, "mid_attention": False},
}

PRESETS: dict[str, dict[str, Any]] = {
    family + size: _preset(**architecture, **scale)
    for family, architecture in _FAMILIES.items()
    for size, scale in _SIZES.items()
}


def preset_config(name: str) -> dict[str, Any]:
    """A fresh copy of a preset's config.json fields; UserError with the nearest name if there is no such preset."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        raise UserError(f"there is no model preset {name!r}: did you mean {near!r}? Known: {', '.join(PRESETS)}")
    return {key: list(value) if isinstance(value, list) else value for key, value in PRESETS[name].items()}


def check_architecture(config: Mapping[str, Any]) -> None:
    """Raise a UserError, in one line, if `config` (config.json fields) is no network that this package builds."""
    for key in ("down_block_types", "up_block_types", "block_out_channels"):
        if not isinstance(config[key], list | tuple) or not config[key]:
            raise UserError(f"{key} is {config[key]!r}: give a list with one entry per resolution")
    widths = config["block_out_channels"]
    for key, known in (("down_block_types", DOWN_BLOCK_TYPES), ("up_block_types", UP_BLOCK_TYPES)):
        types = config[key]
        unknown = [name for name in types if name not in known]
        if unknown:
            raise UserError(f"{key} has {unknown[0]!r}, which is not supported: use {' or '.join(known)}")
        if len(types) != len(widths):
            raise UserError(
                f"{key} has {len(types)} entries and block_out_channels has {len(widths)}: give one per resolution"
            )
    if config["act_fn"] not in ACTIVATIONS:
        raise UserError(f"act_fn {config['act_fn']!r} is not supported: use {' or '.join(ACTIVATIONS)}")
    for key in ("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups"):
        if not isinstance(config[key], int) or config[key] < 1:
            raise UserError(f"{key} is {config[key]!r}: it must be a whole number, at least 1")
    if not isinstance(config["sample_size"], int | list | tuple):
        raise UserError(f"sample_size is {config['sample_size']!r}: it must be a number of pixels")
    groups = config["norm_num_groups"]
    for width in widths:
        if not isinstance(width, int) or width < 1 or width % groups:
            raise UserError(
                f"block_out_channels has {width!r}, not a multiple of norm_num_groups {groups}: change either of them"
            )


class ModelConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Which autoencoder a run trains: a preset with changes, or a starting model as it is."""

    preset: str = Field(
        "f8c4",
        description="Architecture of a new model, f<downsample>c<channels>[-small|-tiny]; start_from goes first.",
    )
    start_from: str | None = Field(
        None, description="Fine-tune this model instead: a diffusers folder, a hub id or an LDM .safetensors file."
    )
    subfolder: str | None = Field(None, description="Folder inside start_from that holds the autoencoder, often 'vae'.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id in start_from.")
    variant: str | None = Field(None, description="Weights variant of start_from, 'fp16' for example.")

    in_channels: int | None = Field(None, ge=1, description="Channels of the images that go in (preset: 3).")
    out_channels: int | None = Field(None, ge=1, description="Channels of the reconstructions (preset: 3).")
    down_block_types: list[str] | None = Field(
        None, description="Encoder stage per resolution, highest first: DownEncoderBlock2D or AttnDownEncoderBlock2D."
    )
    up_block_types: list[str] | None = Field(
        None, description="Decoder stage per resolution, lowest first: UpDecoderBlock2D or AttnUpDecoderBlock2D."
    )
    block_out_channels: list[int] | None = Field(None, description="Channels per resolution, highest first.")
    layers_per_block: int | None = Field(None, ge=1, description="Residual blocks per encoder stage; decoder one more.")
    act_fn: str | None = Field(None, description="Activation: silu.")
    latent_channels: int | None = Field(None, ge=1, description="Channels of the latents.")
    norm_num_groups: int | None = Field(
        None, ge=1, description="Groups of every group norm; leave at least 4 channels per group."
    )
    sample_size: int | None = Field(None, ge=1, description="Tile size in pixels when tiling is enabled in diffusers.")
    scaling_factor: float | None = Field(
        None, gt=0, description="Latents are multiplied by it for diffusion; a new model's is measured at the end."
    )
    shift_factor: float | None = Field(
        None, description="Subtracted from latents before scaling; null in the SD family, measured for SD3 and FLUX."
    )
    latents_mean: list[float] | None = Field(None, description="Per-channel mean of the latents, with latents_std.")
    latents_std: list[float] | None = Field(None, description="Per-channel deviation, with latents_mean.")
    force_upcast: bool | None = Field(None, description="Pipelines in fp16 run this autoencoder in fp32.")
    use_quant_conv: bool | None = Field(None, description="A 1x1 convolution after the encoder.")
    use_post_quant_conv: bool | None = Field(None, description="A 1x1 convolution before the decoder.")
    mid_block_add_attention: bool | None = Field(None, description="Self-attention at the lowest resolution.")

    @model_validator(mode="after")
    def _architecture(self) -> "ModelConfig":
        """Find mistakes when the recipe is read, not when the run starts."""
        if self.start_from is None:
            self.resolved()
            for name in ("subfolder", "revision", "variant"):
                if getattr(self, name) is not None:
                    raise UserError(f"{name} says where in start_from the model lies, and start_from is not set")
        elif self.overrides():
            raise UserError(
                f"{next(iter(self.overrides()))} cannot be set with start_from: the starting model's config.json holds"
            )
        return self

    def overrides(self) -> dict[str, Any]:
        """The config.json fields that were set here."""
        fields = self.model_dump(exclude={"preset", "start_from", "subfolder", "revision", "variant"})
        return {key: value for key, value in fields.items() if value is not None}

    def resolved(self) -> dict[str, Any]:
        """Every config.json field of a new model: the preset's, overridden by what was set; checked."""
        config = preset_config(self.preset) | self.overrides()
        check_architecture(config)
        return config
