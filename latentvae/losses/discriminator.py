"""PatchGAN: a small convolutional network that says for each patch of an image whether it looks real."""

from math import gcd

from pydantic import BaseModel, Field
from torch import Tensor, nn

from latentvae.errors import UserError


class DiscriminatorConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Size of the discriminator; the defaults are those of taming-transformers, with group norm for batch norm."""

    base_channels: int = Field(
        default=64,
        ge=4,
        multiple_of=4,
        description="channels after the first convolution; each layer doubles them, up to 8 times",
    )
    num_layers: int = Field(
        default=3, ge=1, le=6, description="halvings of the resolution; 3 give each logit a view of 70 x 70 pixels"
    )
    norm_num_groups: int = Field(
        default=32, ge=1, description="upper bound of the groups of a group norm; each keeps at least 4 channels"
    )

    @property
    def minimum_size(self) -> int:
        """Smallest side of an image in pixels that leaves one logit."""
        return 3 * 2**self.num_layers  # two last convolutions take one pixel each off H / 2^layers

    def check_size(self, side: int) -> None:
        """Raise a UserError where images of this shorter side, in pixels, leave no logit."""
        if side < self.minimum_size:
            raise UserError(
                f"images have {side} pixels a side; a discriminator of {self.num_layers} layers needs "
                f"{self.minimum_size}: raise data.resolution or lower loss.discriminator.num_layers"
            )


class PatchDiscriminator(nn.Module):
    """images [-1, 1] (B, C, H, W) => logits (B, 1, h', w'), high where a patch looks real.

    Isola et al. 2017 (pix2pix), section 3.2.2.

    Group norm, not batch norm: an image's logits do not depend on its neighbours, so accumulation, the number of
    processes and judging real and fake images together change nothing.
    """

    def __init__(self, in_channels: int = 3, config: DiscriminatorConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DiscriminatorConfig()
        width = config.base_channels
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for index in range(1, config.num_layers + 1):
            previous, width = width, config.base_channels * min(2**index, 8)
            stride = 2 if index < config.num_layers else 1
            groups = gcd(config.norm_num_groups, width // 4)
            layers += [
                nn.Conv2d(previous, width, 4, stride=stride, padding=1, bias=False),  # the norm has a bias
                nn.GroupNorm(groups, width),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(width, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        self.config.check_size(min(images.shape[2:]))
        logits: Tensor = self.layers(images)
        return logits


def _initialise(module: nn.Module) -> None:
    """N(0, 0.02) for convolutions and N(1, 0.02) for norm scales, as in DCGAN (Radford et al. 2016) and pix2pix."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
