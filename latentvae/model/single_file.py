"""What a single weight file holds: where the autoencoder lies in it, its architecture, and the family it belongs to."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from latentvae.errors import UserError
from latentvae.model.ldm_layout import check_shapes

# Where the autoencoder lies: inside a whole Stable Diffusion, or alone.
_PREFIXES = ("first_stage_model.", "vae.", "")
_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
LDM_GROUPS = 32  # of every norm, a constant of the LDM code and of all that follow it
_RELEASED_WIDTHS = [128, 256, 512, 512]


@dataclass(frozen=True)
class Family:
    """What the tensors do not say, from the config.json of the released models on the hub."""

    latent_channels: int
    use_quant_conv: bool
    sample_size: int
    scaling_factor: float
    shift_factor: float | None = None


FAMILIES = {
    "sd1": Family(4, True, 512, 0.18215),
    "sdxl": Family(4, True, 1024, 0.13025),
    "sd3": Family(16, False, 1024, 1.5305, 0.0609),
    "flux1": Family(16, False, 1024, 0.3611, 0.1159),
}
# A piece of a tensor's name in the other parts of a whole checkpoint => its family.
_MARKS = {
    "conditioner.embedders.": "sdxl",
    "cond_stage_model.": "sd1",  # SD 2.x too: its autoencoder has the same scaling
    "joint_blocks.": "sd3",
    "double_blocks.": "flux1",
}


def autoencoder_tensors(checkpoint: Iterable[str]) -> dict[str, str]:
    """The names in a single-file checkpoint that belong to its autoencoder, as they are => without their prefix."""
    names = list(checkpoint)
    for prefix in _PREFIXES:
        found = [name for name in names if name.startswith(tuple(prefix + part for part in _PARTS))]
        if found:
            return {name: name.removeprefix(prefix) for name in found}
    return {}


def single_file_config(
    shapes: Mapping[str, Sequence[int]],
    source: object,
    *,
    family: str | None = None,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
) -> dict[str, Any]:
    """The fields of config.json for an AutoencoderKL in a single file, in the LDM or the diffusers layout.

    The architecture is read from the tensors, the latent scaling is that of the family.

    Args:
        shapes: of every tensor in the file, by name; the other parts of a whole checkpoint name the family.
        source: the file, for messages.
        family: a key of `FAMILIES`; None: recognised.
        scaling_factor, shift_factor: in place of the family's; with them a file may be of no known family.

    Raises:
        UserError: no autoencoder, an unsupported one, or a family that the file does not tell.
    """
    names = autoencoder_tensors(shapes)
    own = {bare: shapes[name] for name, bare in names.items()}
    if not own:
        raise UserError(f"{source} holds no autoencoder: no tensor named encoder.*, first_stage_model.* or vae.*")
    if any("bn.running_mean" in name for name in shapes):
        raise UserError(f"{source} is an autoencoder of FLUX.2: use its diffusers folder, which needs no conversion")
    architecture = _architecture(own, source)
    check_shapes(own, architecture, source, {bare: name for name, bare in names.items()})
    fitting = fitting_families(architecture)
    known = family or recognised_family(shapes)
    if known is not None and known not in fitting:
        fits = f"it looks like {' or '.join(fitting)}" if fitting else "it is of no known family"
        raise UserError(
            f"{source} is not of family {known}: it has {architecture['latent_channels']} latent channels "
            f"{'with' if architecture['use_quant_conv'] else 'without'} quant convs; {fits}"
        )
    if known is None and scaling_factor is None:
        if fitting:
            choices = " or ".join(f"--arch {name} ({FAMILIES[name].scaling_factor})" for name in fitting)
            problem = f"has the layout of {' and of '.join(fitting)}, which differ in scaling_factor: convert it with"
        else:
            problem, choices = "is of no known family, and has no scaling_factor: convert it with", "--scaling-factor"
        raise UserError(f"{source} {problem} {choices}, or put the model's config.json beside it")
    base = FAMILIES[known] if known is not None else None
    if base is not None:
        architecture["sample_size"] = base.sample_size
        scaling_factor = base.scaling_factor if scaling_factor is None else scaling_factor
        shift_factor = base.shift_factor if shift_factor is None else shift_factor
    return architecture | {"scaling_factor": scaling_factor, "shift_factor": shift_factor}


def recognised_family(names: Iterable[str]) -> str | None:
    """The key of `FAMILIES` that the other parts of a whole checkpoint tell; None where there are none."""
    listed = list(names)
    return next((family for piece, family in _MARKS.items() if any(piece in name for name in listed)), None)


def fitting_families(architecture: Mapping[str, Any]) -> list[str]:
    """The keys of `FAMILIES` whose latents have the form that these fields of config.json give."""
    form = (architecture["latent_channels"], architecture["use_quant_conv"])
    return [name for name, family in FAMILIES.items() if (family.latent_channels, family.use_quant_conv) == form]


def _architecture(shapes: Mapping[str, Sequence[int]], source: object) -> dict[str, Any]:
    """The fields of config.json that tensors tell; names without prefix, in either layout."""
    is_ldm = any(name.startswith("encoder.down.") for name in shapes)
    where, what = ("down", "block") if is_ldm else ("down_blocks", "resnets")
    block = re.compile(rf"encoder\.{where}\.(\d{{1,6}})\.{what}\.(\d{{1,6}})\.")
    blocks = {(int(found[1]), int(found[2])) for name in shapes if (found := block.match(name))}
    if any(re.search(r"\.(down|up)\.\d+\.attn\.", name) for name in shapes):
        raise UserError(f"{source} has attention in the stages of an LDM layout, which diffusers' conversion lacks")
    if not blocks:
        raise UserError(f"{source} lacks weights of an AutoencoderKL: it has no residual blocks in an encoder")
    num_levels, num_layers = (1 + max(key[axis] for key in blocks) for axis in (0, 1))
    needed = itertools.chain(  # lazily: a name in a damaged file may count to millions
        (f"{half}.{part}.weight" for half in ("encoder", "decoder") for part in ("conv_in", "conv_out")),
        (
            f"encoder.{where}.{level}.{what}.{layer}.conv1.weight"
            for level in range(num_levels)
            for layer in range(num_layers)
        ),
    )
    for name in needed:
        if name not in shapes:
            raise UserError(f"{source} lacks weights of an AutoencoderKL: it has none named {name}")
        if len(shapes[name]) != 4:
            raise UserError(f"{source}: {name} is of {len(shapes[name])} dimensions, and a 2D convolution has 4")
    widths = [shapes[f"encoder.{where}.{level}.{what}.0.conv1.weight"][0] for level in range(num_levels)]
    fields = {
        "in_channels": shapes["encoder.conv_in.weight"][1],
        "out_channels": shapes["decoder.conv_out.weight"][0],
        "latent_channels": shapes["decoder.conv_in.weight"][1],
    }
    if not is_ldm and widths != _RELEASED_WIDTHS:
        raise UserError(
            f"{source} does not tell the groups of its norms, and widths {widths} are not those of a released model: "
            "put the model's config.json beside it"
        )
    attention = "encoder.mid.attn_1." if is_ldm else "encoder.mid_block.attentions."
    return fields | {
        "block_out_channels": widths,
        "layers_per_block": num_layers,
        "down_block_types": ["DownEncoderBlock2D"] * num_levels,
        "up_block_types": ["UpDecoderBlock2D"] * num_levels,
        "norm_num_groups": LDM_GROUPS,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": any(name.startswith(attention) for name in shapes),
        "force_upcast": True,
    }
