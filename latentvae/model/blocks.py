"""The parts of the autoencoder, as plain PyTorch: residual block, self-attention, down- and upsampling, stages.

Parameter names are those of diffusers' AutoencoderKL, so that weights move both ways. Everything takes and gives the
memory format it is given, contiguous or channels-last. Letters in shapes: B images, C channels, H x W pixels of the
feature map, N = H*W positions.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

NORM_EPS = 1e-6  # of every group norm in the LDM family, not PyTorch's 1e-5


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on the skip where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, in_channels, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(num_groups, out_channels, eps=NORM_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(functional.silu(self.norm1(x)))  # (B, C', H, W)
        h = self.conv2(functional.silu(self.norm2(h)))  # (B, C', H, W)
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class SelfAttention(nn.Module):
    """Every position attends to every other, one head as wide as the feature map, with a residual."""

    _from_deprecated_attn_block = True  # diffusers then renames query, key, value, proj_attn of old folders on load
    processor = None  # pipelines that upcast an SDXL autoencoder ask which one it is

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(num_groups, channels, eps=NORM_EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, N, C)
        q, k, v = (layer(tokens).unsqueeze(1) for layer in (self.to_q, self.to_k, self.to_v))  # (B, 1, N, C)
        attended = functional.scaled_dot_product_attention(q, k, v).squeeze(1)  # (B, N, C)
        return x + self.to_out[0](attended).transpose(1, 2).unflatten(2, x.shape[-2:])  # (B, C, H, W)


class Downsample(nn.Module):
    """Half the resolution by a strided convolution, padded at the right and the bottom only, as LDM did."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(functional.pad(x, (0, 1, 0, 1)))  # (B, C, H/2, W/2)


class Upsample(nn.Module):
    """Twice the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if 4 * x.numel() >= 2**31:
            x = x.contiguous()  # PyTorch's channels-last kernel counts in 32 bits (pytorch issue 141831)
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, C, 2H, 2W)


class _Stage(nn.Module):
    """Residual blocks at one resolution, each followed by attention where the stage has it."""

    def __init__(self, in_channels: int, out_channels: int, num_layers: int, num_groups: int, has_attention: bool):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_layers
        self.attentions = nn.ModuleList(
            SelfAttention(out_channels, num_groups) for _ in range(num_layers if has_attention else 0)
        )
        self.resnets = nn.ModuleList(ResidualBlock(*pair, num_groups) for pair in pairwise(widths))

    def _layers(self, x: Tensor) -> Tensor:
        for index, resnet in enumerate(self.resnets):
            x = resnet(x)
            if len(self.attentions) > 0:
                x = self.attentions[index](x)
        return x


class DownStage(_Stage):
    """One resolution of the encoder; all but the last end with a `Downsample`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        num_groups: int,
        *,
        has_attention: bool,
        has_downsample: bool,
    ) -> None:
        super().__init__(in_channels, out_channels, num_layers, num_groups, has_attention)
        self.downsamplers = nn.ModuleList([Downsample(out_channels)] if has_downsample else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self._layers(x)
        for downsample in self.downsamplers:
            x = downsample(x)
        return x


class UpStage(_Stage):
    """One resolution of the decoder; all but the last end with an `Upsample`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        num_groups: int,
        *,
        has_attention: bool,
        has_upsample: bool,
    ) -> None:
        super().__init__(in_channels, out_channels, num_layers, num_groups, has_attention)
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if has_upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self._layers(x)
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


class MiddleStage(nn.Module):
    """The lowest resolution: residual block, attention where wanted, residual block."""

    def __init__(self, channels: int, num_groups: int, *, has_attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([SelfAttention(channels, num_groups)] if has_attention else [])
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels, num_groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class CheckpointedStages(nn.Module):
    """A network of stages that can be recomputed in the backward pass instead of kept.

    The two attributes are the ones that `enable_gradient_checkpointing` of a diffusers model looks for and sets.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func = _recomputed

    def _stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(stage, x)
        return stage(x)


def _recomputed(stage: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(stage, x, use_reentrant=False)
