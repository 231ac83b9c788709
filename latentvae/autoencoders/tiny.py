"""Tiny autoencoders from their published files (madebyollin/taesd), also with the pooled blocks of FLUX.2's."""

from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch import Tensor, nn

from latentvae.errors import UserError

DiffusersAutoencoderTiny: Any = diffusers.AutoencoderTiny  # type checkers see an empty stand-in under the lazy import
TinyBlock: Any = AutoencoderTinyBlock

_POOL_GROUPS = 4
_POOL_WIDENING = 4


class PooledBlock(TinyBlock):
    """A residual block whose input first gains a 1x1 branch with a group norm, which sees the whole image."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, "relu")
        wide = _POOL_WIDENING * channels
        self.pool = nn.Sequential(
            nn.Conv2d(channels, wide, 1, bias=False),
            nn.GroupNorm(_POOL_GROUPS, wide),
            nn.ReLU(),
            nn.Conv2d(wide, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) => the same shape."""
        output: Tensor = super().forward(x + self.pool(x))
        return output


class AutoencoderTinyPool(DiffusersAutoencoderTiny):
    """`diffusers.AutoencoderTiny` with pooled blocks at the lowest resolution, as TAEF2 has: diffusers lacks those.

    Its `act_fn` in config.json is "relu+pool": plain AutoencoderTiny refuses it, where it would otherwise leave the
    branches out with a warning, and decode to wrong pictures.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        act_fn: str = "relu+pool",
        upsample_fn: str = "nearest",
        latent_channels: int = 32,
        upsampling_scaling_factor: int = 2,
        num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3),
        num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1),
        latent_magnitude: int = 3,
        latent_shift: float = 0.5,
        force_upcast: bool = False,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        if act_fn != "relu+pool":
            raise UserError(f"act_fn is {act_fn!r}: an AutoencoderTinyPool has 'relu+pool'")
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            encoder_block_out_channels=encoder_block_out_channels,
            decoder_block_out_channels=decoder_block_out_channels,
            act_fn="relu",
            upsample_fn=upsample_fn,
            latent_channels=latent_channels,
            upsampling_scaling_factor=upsampling_scaling_factor,
            num_encoder_blocks=num_encoder_blocks,
            num_decoder_blocks=num_decoder_blocks,
            latent_magnitude=latent_magnitude,
            latent_shift=latent_shift,
            force_upcast=force_upcast,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
        )
        self.register_to_config(act_fn=act_fn)  # over what diffusers' class has just registered
        layers, count = self.encoder.layers, num_encoder_blocks[-1]
        for index in range(len(layers) - 1 - count, len(layers) - 1):  # before the last convolution
            layers[index] = PooledBlock(encoder_block_out_channels[-1])
        for index in range(2, 2 + num_decoder_blocks[0]):  # after the first convolution and its activation
            self.decoder.layers[index] = PooledBlock(decoder_block_out_channels[0])


def tiny_from_tensors(encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor]) -> Any:
    """An AutoencoderTiny (AutoencoderTinyPool where there are pooled blocks) from the two published state dicts.

    Their names begin with a layer's number. The encoder's are diffusers' own; the decoder's count a first layer without
    weights, the clamp that diffusers applies in `forward`. Architecture and dtype are those of the tensors.

    Raises:
        UserError: another architecture, or tensors that are missing, too many or of another shape.
    """
    config = _config(_stages("encoder", encoder), _stages("decoder", decoder), encoder, decoder)
    has_pool = any(".pool." in name for name in (*encoder, *decoder))
    weights = {f"encoder.layers.{name}": tensor for name, tensor in encoder.items()}
    for name, tensor in decoder.items():
        number, _, rest = name.partition(".")
        weights[f"decoder.layers.{int(number) - 1}.{rest}"] = tensor
    dtypes = {tensor.dtype for tensor in weights.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32

    with torch.device("meta"):
        model = (AutoencoderTinyPool if has_pool else DiffusersAutoencoderTiny)(**config)
    expected = model.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        found, wanted = (list(state[name].shape) if name in state else "absent" for state in (weights, expected))
        if found != wanted:
            raise UserError(f"{name} is {found} where {wanted} is expected: {_LAYOUT}")
    model.load_state_dict({name: tensor.to(dtype, copy=True) for name, tensor in weights.items()}, assign=True)
    return model.eval()


_LAYOUT = "the layouts of taesd, taesdxl, taesd3, taef1 and taef2 are supported"


def _stages(part: str, state: Mapping[str, Tensor]) -> list[tuple[int, int]]:
    """(width, number of blocks) between each convolution that stands alone and the next."""
    layers: set[int] = set()
    for name in state:
        number = name.partition(".")[0]
        if not number.isdecimal():
            raise UserError(f"the {part} has a tensor named {name}, which begins with no layer's number: {_LAYOUT}")
        layers.add(int(number))
    stages: list[tuple[int, int]] = []
    for layer in sorted(layers):
        if f"{layer}.weight" in state:
            if state[f"{layer}.weight"].ndim != 4:
                raise UserError(f"the {part}'s {layer}.weight is no kernel of a convolution: {_LAYOUT}")
            stages.append((state[f"{layer}.weight"].shape[0], 0))
        elif stages:
            stages[-1] = (stages[-1][0], stages[-1][1] + 1)
    if len(stages) < 2:
        raise UserError(f"the {part} has fewer than two convolutions between its blocks: {_LAYOUT}")
    return stages[:-1]


def _config(
    encoder_stages: list[tuple[int, int]],
    decoder_stages: list[tuple[int, int]],
    encoder: Mapping[str, Tensor],
    decoder: Mapping[str, Tensor],
) -> dict[str, Any]:
    last = [max(int(name.partition(".")[0]) for name in state) for state in (encoder, decoder)]
    first = min(int(name.partition(".")[0]) for name in decoder)
    try:
        made, taken = encoder[f"{last[0]}.weight"].shape[0], decoder[f"{first}.weight"].shape[1]
        in_channels, out_channels = encoder["0.weight"].shape[1], decoder[f"{last[1]}.weight"].shape[0]
    except (KeyError, IndexError) as error:
        raise UserError(f"no convolution at the beginning or end ({error}): {_LAYOUT}") from error
    if made != taken:
        raise UserError(f"the encoder makes {made} latent channels, the decoder takes {taken}: they are no pair")
    return {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "latent_channels": made,
        "encoder_block_out_channels": tuple(width for width, _ in encoder_stages),
        "decoder_block_out_channels": tuple(width for width, _ in decoder_stages),
        "num_encoder_blocks": tuple(count for _, count in encoder_stages),
        "num_decoder_blocks": tuple(count for _, count in decoder_stages),
    }
