"""What the programs that read single files can build, and which latent scaling they take for granted."""

import math
from collections.abc import Mapping
from typing import Any

from latentvae.errors import UserError
from latentvae.model.scaling import LatentScaling
from latentvae.model.single_file import FAMILIES, LDM_GROUPS, fitting_families

# ComfyUI reads no configuration: class VAE in its comfy/sd.py (Comfy-Org/ComfyUI, commit 35ead00) builds one network,
# `Encoder` and `Decoder` of comfy/ldm/modules/diffusionmodules/model.py, with these constants. It has four stages, or
# three where neither encoder.down.2.downsample nor decoder.up.3.upsample is in the file.
_COMFYUI_WIDTHS = ([128, 256, 512, 512], [128, 256, 512])  # ch 128 times ch_mult [1, 2, 4, 4] or [1, 2, 4]
_COMFYUI_LAYERS = 2
_COMFYUI_CHANNELS = 3
_HUNYUAN_CHANNELS = 64  # decoder.conv_in of so many is taken for HunyuanImage's 32x network
_FAMILY_DOWNSAMPLING = 8  # of every family in FAMILIES
_SAME = 1e-6  # relative: config.json holds decimal numbers


def check_layout(config: Mapping[str, Any]) -> None:
    """Raise a UserError for what no single file can hold: attention in the stages, which no loader reads there."""
    for field in ("down_block_types", "up_block_types"):
        attention = [name for name in config[field] if "Attn" in name]
        if attention:
            raise UserError(
                f"the model has attention in its stages ({field} has {attention[0]}), which neither diffusers nor "
                "ComfyUI reads from a single file: export it with --format diffusers"
            )


def comfyui_obstacle(config: Mapping[str, Any]) -> str | None:
    """Why ComfyUI cannot build the model of these config.json fields, None if it can."""
    widths = list(config["block_out_channels"])
    if widths not in _COMFYUI_WIDTHS:
        known = " or ".join(", ".join(map(str, known)) for known in _COMFYUI_WIDTHS)
        return f"block_out_channels is {', '.join(map(str, widths))}, and it builds {known}"
    wanted: dict[str, Any] = {
        "layers_per_block": _COMFYUI_LAYERS,
        "norm_num_groups": LDM_GROUPS,
        "in_channels": _COMFYUI_CHANNELS,
        "out_channels": _COMFYUI_CHANNELS,
        "mid_block_add_attention": True,
    }
    for name, value in wanted.items():
        if config[name] != value:
            return f"{name} is {config[name]}, and it builds {value}"
    if config["use_quant_conv"] != config["use_post_quant_conv"]:
        return "only one of quant_conv and post_quant_conv is there, and it builds both or neither"
    if config["latent_channels"] == _HUNYUAN_CHANNELS:
        return f"it takes {_HUNYUAN_CHANNELS} latent channels for those of HunyuanImage's 32x autoencoder"
    return None


def scaling_text(config: Mapping[str, Any]) -> str:
    """The model's latent scaling in words."""
    if config.get("latents_mean") is not None:
        return f"scaling_factor {config['scaling_factor']:g} with per-channel latents_mean and latents_std"
    shift = config.get("shift_factor")
    return f"scaling_factor {config['scaling_factor']:g}" + (f" and shift_factor {shift:g}" if shift else "")


def has_scaling_of(config: Mapping[str, Any], family: str) -> bool:
    """Whether the model's latents are normalized as those of the released models of a family."""
    scaling, known = LatentScaling.from_config(config), FAMILIES[family]
    return (
        scaling.mean is None
        and math.isclose(scaling.scale, known.scaling_factor, rel_tol=_SAME)
        and math.isclose(scaling.shift, known.shift_factor or 0.0, rel_tol=_SAME)
    )


def scaling_warning(config: Mapping[str, Any], family: str | None = None) -> str:
    """What becomes of the latent scaling, which no single file carries.

    Args:
        config: fields of the model's config.json.
        family: of the checkpoint that the model is put into; None: whatever families have latents of its form.
    """
    ours = scaling_text(config)
    if family is not None:
        if has_scaling_of(config, family):
            return ""
        return (
            f"the model has {ours}, and whatever loads the checkpoint takes {family}'s, {scaling_text(_fields(family))}"
            ": its latents will be scaled wrongly, unless that diffusion model was trained on them"
        )
    is_known_depth = 2 ** (len(config["block_out_channels"]) - 1) == _FAMILY_DOWNSAMPLING
    families = fitting_families(config) if is_known_depth else []
    lost = f"a single file carries no latent scaling, and this model has {ours}"
    if not families:
        return f"{lost}; no released family has latents of its form: tell whatever loads it"
    same = [name for name in families if has_scaling_of(config, name)]
    others = " and ".join(f"{name} ({scaling_text(_fields(name))})" for name in families if name not in same)
    if same:
        return f"{lost}, which is {same[0]}'s: right beside a diffusion model of {same[0]}, wrong beside {others}"
    return f"{lost}; its form is that of {others}, whose scaling loaders take: the latents will be scaled WRONGLY there"


def _fields(family: str) -> dict[str, Any]:
    known = FAMILIES[family]
    return {"scaling_factor": known.scaling_factor, "shift_factor": known.shift_factor}
