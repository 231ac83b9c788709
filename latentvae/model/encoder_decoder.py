"""The two networks. They know nothing of scale, sampling, losses or devices.

Letters in shapes: B images, C image channels, H x W pixels, f downsample factor, D latent channels,
h x w = H/f x W/f, C0 and Cn the channels at the highest and the lowest resolution.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from latentvae.model.blocks import NORM_EPS, CheckpointedStages, DownStage, MiddleStage, UpStage


class Encoder(CheckpointedStages):
    """images [-1, 1] => moments before the quant conv: mean and log variance of each latent element."""

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        block_out_channels: Sequence[int],
        has_attention: Sequence[bool],
        layers_per_block: int,
        norm_num_groups: int,
        mid_block_add_attention: bool,
    ) -> None:
        """`block_out_channels` and `has_attention`: one entry per resolution, highest first."""
        super().__init__()
        highest, lowest = block_out_channels[0], block_out_channels[-1]
        last = len(block_out_channels) - 1
        self.conv_in = nn.Conv2d(in_channels, highest, 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownStage(
                block_out_channels[max(i - 1, 0)],
                block_out_channels[i],
                layers_per_block,
                norm_num_groups,
                has_attention=has_attention[i],
                has_downsample=i < last,
            )
            for i in range(last + 1)
        )
        self.mid_block = MiddleStage(lowest, norm_num_groups, has_attention=mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, lowest, eps=NORM_EPS)
        self.conv_out = nn.Conv2d(lowest, 2 * latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)  # (B, C0, H, W)
        for stage in self.down_blocks:
            x = self._stage(stage, x)
        x = self._stage(self.mid_block, x)  # (B, Cn, h, w)
        return self.conv_out(functional.silu(self.conv_norm_out(x)))  # (B, 2D, h, w)


class Decoder(CheckpointedStages):
    """latents after the post-quant conv => reconstructions, about [-1, 1], not clamped."""

    def __init__(
        self,
        out_channels: int,
        latent_channels: int,
        block_out_channels: Sequence[int],
        has_attention: Sequence[bool],
        layers_per_block: int,
        norm_num_groups: int,
        mid_block_add_attention: bool,
    ) -> None:
        """`block_out_channels`: one entry per resolution, highest first; `has_attention`: lowest first."""
        super().__init__()
        widths = list(reversed(block_out_channels))
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.up_blocks = nn.ModuleList(
            UpStage(
                widths[max(i - 1, 0)],
                widths[i],
                layers_per_block + 1,
                norm_num_groups,
                has_attention=has_attention[i],
                has_upsample=i < last,
            )
            for i in range(last + 1)
        )
        self.mid_block = MiddleStage(widths[0], norm_num_groups, has_attention=mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def features(self, latents: Tensor) -> Tensor:
        """The input of the last layer `conv_out`, from which that layer's weight gradient follows: (B, C0, H, W)."""
        x = self.conv_in(latents)  # (B, Cn, h, w)
        x = self._stage(self.mid_block, x)
        for stage in self.up_blocks:
            x = self._stage(stage, x)
        return functional.silu(self.conv_norm_out(x))  # (B, C0, H, W)

    def forward(self, latents: Tensor) -> Tensor:
        return self.conv_out(self.features(latents))  # (B, C, H, W)
