"""Names and shapes of an AutoencoderKL's weights, in diffusers' layout and in that of LDM files."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from latentvae.errors import UserError

Shape = tuple[int, ...]

# Pieces of diffusers' names => those of the LDM code; stages are numbered apart, since the decoder counts backwards.
_PIECES = {
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.",
    "conv_norm_out.": "norm_out.",
    "conv_shortcut.": "nin_shortcut.",
    ".group_norm.": ".norm.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    ".to_out.0.": ".proj_out.",
    # the same in folders from before diffusers 0.15
    ".query.": ".q.",
    ".key.": ".k.",
    ".value.": ".v.",
    ".proj_attn.": ".proj_out.",
}
_PARTS = {"resnets": "block", "attentions": "attn", "downsamplers": "downsample", "upsamplers": "upsample"}
_STAGE = re.compile(r"(down|up)_blocks\.(\d{1,6})\.(resnets|attentions|downsamplers|upsamplers)\.(\d{1,6})\.")
_MIDDLE_ATTENTION = re.compile(r"(encoder|decoder)\.(mid_block\.attentions\.0|mid\.attn_1)\.\w+(\.0)?\.weight")


def ldm_name(name: str, num_levels: int) -> str:
    """The LDM name of a weight that diffusers names `name`, in a model of `num_levels` resolutions."""

    def stage(found: re.Match[str]) -> str:
        side, level, part, number = found[1], int(found[2]), found[3], found[4]
        level = num_levels - 1 - level if side == "up" else level  # LDM counts both from the highest resolution
        inner = f"{_PARTS[part]}." if part.endswith("samplers") else f"{_PARTS[part]}.{number}."
        return f"{side}.{level}.{inner}"

    name = _STAGE.sub(stage, name)
    for theirs, ldm in _PIECES.items():
        name = name.replace(theirs, ldm)
    return name


def ldm_tensors(weights: Mapping[str, Tensor], num_levels: int) -> dict[str, Tensor]:
    """Weights by diffusers' names => by LDM's: the matrices of attention are 1 x 1 convolutions there."""
    return {
        ldm_name(name, num_levels): tensor[:, :, None, None].contiguous() if _is_matrix(name, tensor.ndim) else tensor
        for name, tensor in weights.items()
    }


def _is_matrix(name: str, ndim: int) -> bool:
    return ndim == 2 and _MIDDLE_ATTENTION.fullmatch(name) is not None


def expected_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """The shape of every weight by its name in diffusers, as fields of config.json ask for them."""
    widths, layers = list(config["block_out_channels"]), config["layers_per_block"]
    latent_channels, last = config["latent_channels"], len(widths) - 1
    has_middle = config["mid_block_add_attention"]

    def encoder() -> Iterator[tuple[str, Shape]]:
        yield from _conv("encoder.conv_in", config["in_channels"], widths[0], 3)
        width = widths[0]
        for level, wanted in enumerate(widths):
            stage = f"encoder.down_blocks.{level}"
            yield from _layers(stage, layers, width, wanted, "Attn" in config["down_block_types"][level])
            if level < last:
                yield from _conv(f"{stage}.downsamplers.0.conv", wanted, wanted, 3)
            width = wanted
        yield from _middle("encoder", width, has_middle)
        yield from _conv("encoder.conv_out", width, 2 * latent_channels, 3)  # mean and log variance

    def decoder() -> Iterator[tuple[str, Shape]]:
        width = widths[-1]
        yield from _conv("decoder.conv_in", latent_channels, width, 3)
        for level, wanted in enumerate(reversed(widths)):
            stage = f"decoder.up_blocks.{level}"
            yield from _layers(stage, layers + 1, width, wanted, "Attn" in config["up_block_types"][level])
            if level < last:
                yield from _conv(f"{stage}.upsamplers.0.conv", wanted, wanted, 3)
            width = wanted
        yield from _middle("decoder", widths[-1], has_middle, out_width=width)
        yield from _conv("decoder.conv_out", width, config["out_channels"], 3)

    shapes = dict([*encoder(), *decoder()])
    if config["use_quant_conv"]:
        shapes |= _conv("quant_conv", 2 * latent_channels, 2 * latent_channels, 1)
    if config["use_post_quant_conv"]:
        shapes |= _conv("post_quant_conv", latent_channels, latent_channels, 1)
    return shapes


def _conv(name: str, in_channels: int, out_channels: int, side: int) -> list[tuple[str, Shape]]:
    return [(f"{name}.weight", (out_channels, in_channels, side, side)), (f"{name}.bias", (out_channels,))]


def _norm(name: str, width: int) -> list[tuple[str, Shape]]:
    return [(f"{name}.weight", (width,)), (f"{name}.bias", (width,))]


def _residual(name: str, width: int, out_width: int) -> Iterator[tuple[str, Shape]]:
    yield from _norm(f"{name}.norm1", width)
    yield from _conv(f"{name}.conv1", width, out_width, 3)
    yield from _norm(f"{name}.norm2", out_width)
    yield from _conv(f"{name}.conv2", out_width, out_width, 3)
    if width != out_width:
        yield from _conv(f"{name}.conv_shortcut", width, out_width, 1)


def _attention(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield from _norm(f"{name}.group_norm", width)
    for matrix in ("to_q", "to_k", "to_v", "to_out.0"):
        yield f"{name}.{matrix}.weight", (width, width)
        yield f"{name}.{matrix}.bias", (width,)


def _layers(stage: str, number: int, width: int, out_width: int, has_attention: bool) -> Iterator[tuple[str, Shape]]:
    for layer in range(number):
        yield from _residual(f"{stage}.resnets.{layer}", out_width if layer else width, out_width)
        if has_attention:
            yield from _attention(f"{stage}.attentions.{layer}", out_width)


def _middle(half: str, width: int, has_attention: bool, out_width: int | None = None) -> Iterator[tuple[str, Shape]]:
    """The lowest resolution of a half, and the norm before its last convolution."""
    for number in (0, 1):
        yield from _residual(f"{half}.mid_block.resnets.{number}", width, width)
    if has_attention:
        yield from _attention(f"{half}.mid_block.attentions.0", width)
    yield from _norm(f"{half}.conv_norm_out", out_width or width)


def check_shapes(
    shapes: Mapping[str, Sequence[int]],
    config: Mapping[str, Any],
    source: object,
    shown: Mapping[str, str],
) -> None:
    """Raise a UserError that names the first weight that is absent, surplus or of another shape.

    Args:
        shapes: of the autoencoder's weights in a file, by their names without prefix, in either layout.
        config: fields of config.json.
        source: the file, for messages.
        shown: name without prefix => the whole name in the file; where one is absent, ours is shown.
    """
    num_levels = len(config["block_out_channels"])
    is_ldm = any(name.startswith(("encoder.down.", "decoder.up.")) for name in shapes)
    wanted = {ldm_name(name, num_levels): (name, shape) for name, shape in expected_shapes(config).items()}
    found = {ldm_name(name, num_levels): name for name in shapes}
    prefix = next((whole.removesuffix(name) for name, whole in shown.items()), "")
    for name, (theirs, shape) in wanted.items():
        if name not in found:
            raise UserError(f"{source} lacks {prefix}{name if is_ldm else theirs}, of shape {shape_text(shape)}")
        there = tuple(shapes[found[name]])
        if there != shape and not (there == (*shape, 1, 1) and _is_matrix(theirs, len(shape))):
            raise UserError(
                f"{source}: {shown[found[name]]} is of shape {shape_text(there)}, and {shape_text(shape)} is needed"
            )
    surplus = sorted(shown[theirs] for name, theirs in found.items() if name not in wanted)
    if surplus:
        more = "" if len(surplus) == 1 else f" and {len(surplus) - 1} more"
        raise UserError(f"{source} has {surplus[0]}{more}, which no AutoencoderKL of its shape has")


def shape_text(shape: Sequence[int]) -> str:
    """For messages: 64x3x3x3."""
    return "x".join(map(str, shape)) or "one number"
