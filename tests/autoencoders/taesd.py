"""The published tiny autoencoders' layers by number, built from their description: images in [0, 1], no diffusers."""

import torch
from torch import nn


class Block(nn.Module):
    """Three 3x3 convolutions beside the identity; pooled: the input first gains a normalized 1x1 branch."""

    def __init__(self, channels, pooled):
        super().__init__()
        convs = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])
        if pooled:
            narrow, wide = (
                nn.Conv2d(4 * channels, channels, 1, bias=False),
                nn.Conv2d(channels, 4 * channels, 1, bias=False),
            )
            self.pool = nn.Sequential(wide, nn.GroupNorm(4, 4 * channels), nn.ReLU(), narrow)

    def forward(self, x):
        if hasattr(self, "pool"):
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class Clamp(nn.Module):
    def forward(self, x):
        return 3 * torch.tanh(x / 3)


def encoder(width, latent_channels, pooled=False, blocks=(1, 3, 3, 3)):
    layers = [nn.Conv2d(3, width, 3, padding=1)]
    for stage, count in enumerate(blocks):
        if stage:
            layers.append(nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False))
        layers += [Block(width, pooled and stage == len(blocks) - 1) for _ in range(count)]
    return nn.Sequential(*layers, nn.Conv2d(width, latent_channels, 3, padding=1))


def decoder(width, latent_channels, pooled=False, blocks=(3, 3, 3, 1)):
    layers = [Clamp(), nn.Conv2d(latent_channels, width, 3, padding=1), nn.ReLU()]
    for stage, count in enumerate(blocks):
        layers += [Block(width, pooled and stage == 0) for _ in range(count)]
        if stage < len(blocks) - 1:
            layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, nn.Conv2d(width, 3, 3, padding=1))
