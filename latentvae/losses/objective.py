"""What the autoencoder and the discriminator minimise: the terms, their weights, and when each of them is on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight
from torch.nn.parallel import DistributedDataParallel

from latentvae.losses.config import LossConfig
from latentvae.losses.perceptual import Perceptual
from latentvae.losses.terms import hinge_discriminator, hinge_generator, kl, l1, l2, widened


class StepTensors(Protocol):
    """What one forward of the autoencoder gives."""

    @property
    def moments(self) -> Tensor: ...  # (B, 2c, h, w)
    @property
    def reconstructions(self) -> Tensor: ...  # (B, C, H, W)
    @property
    def features(self) -> Tensor: ...  # (B, C0, H, W), the input of the last convolution


@dataclass(frozen=True)
class GeneratorLoss:
    """`loss.backward()` gives the whole gradient of the batch mean; its value is the composed loss.

    `terms`: unweighted and detached, (B,) each. `adaptive_weight`: the clamped ratio of gradient norms before
    `adversarial_weight` multiplies it, 0-dim; None where the adversarial term is off or its balance constant.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    adaptive_weight: Tensor | None


@dataclass(frozen=True)
class DiscriminatorLoss:
    """`loss`: mean over the batch. `terms`: detached, (B,).

    `watched`: 0-dim means over all patches: real_logits, fake_logits, and accuracy, the share of patches judged
    rightly (real > 0, fake < 0).
    """

    loss: Tensor
    terms: dict[str, Tensor]
    watched: dict[str, Tensor]


def _identity(x: Tensor) -> Tensor:
    return x


class Objective:
    """Composes the terms. It has no parameters: nothing of it belongs in a checkpoint."""

    def __init__(self, config: LossConfig, perceptual: Perceptual | None = None) -> None:
        """`config` must be resolved where it has an adversarial term; `perceptual` is needed where it has LPIPS."""
        if config.has_perceptual != (perceptual is not None):
            raise ValueError(f"loss.perceptual={config.perceptual} and the perceptual module given do not agree")
        if config.has_adversarial and (config.discriminator_start is None or config.adversarial_start is None):
            raise ValueError("the starts of the adversarial loss are open: call LossConfig.resolved(total_images)")
        self.config = config
        self.perceptual = perceptual

    @classmethod
    def from_config(cls, config: LossConfig, *, channels: int = 3, device: torch.device | str = "cpu") -> Self:
        """Build the perceptual module too; UserError where its weights or bands are missing."""
        perceptual = None
        if config.has_perceptual and config.perceptual != "none":
            perceptual = Perceptual(config.perceptual, channels=channels, bands=config.perceptual_bands).to(device)
        return cls(config, perceptual)

    def active_discriminator(self, images_seen: int) -> bool:
        """Whether the discriminator trains on the batch that follows `images_seen` images."""
        start = self.config.discriminator_start
        return self.config.has_adversarial and start is not None and images_seen >= start

    def active_adversarial(self, images_seen: int) -> bool:
        """Whether the autoencoder feels the discriminator on the batch that follows `images_seen` images."""
        start = self.config.adversarial_start
        return self.config.has_adversarial and start is not None and images_seen >= start

    def generator(
        self,
        images: Tensor,
        output: StepTensors,
        *,
        last_layer: nn.Conv2d,
        discriminator: nn.Module | None,
        images_seen: int,
        average: Callable[[Tensor], Tensor] = _identity,
    ) -> GeneratorLoss:
        """The autoencoder's loss: images [-1, 1] (B, C, H, W) and one forward's output => a mean over the batch.

        `discriminator` is the plain module, not the wrapped one: only the gradient at its input is taken, so its
        parameters and their hooks stay out of it. `average` is the mean over processes of a small tensor.
        """
        kl_term = kl(output.moments)
        weighted_kl = self.config.kl_weight * kl_term.mean()
        if not self.active_adversarial(images_seen):
            terms, likelihood = self._likelihood(images, output.reconstructions)
            return GeneratorLoss(likelihood + weighted_kl, _detached({**terms, "kl": kl_term}), None)
        if discriminator is None or isinstance(discriminator, DistributedDataParallel):
            raise TypeError(f"the adversarial term needs the plain discriminator, not {type(discriminator).__name__}")

        # One backward through the autoencoder: image-space gradients on a leaf copy of the reconstruction, summed.
        leaf = widened(output.reconstructions.detach()).requires_grad_()  # (B, C, H, W)
        terms, likelihood = self._likelihood(images, leaf)
        adversarial_term = hinge_generator(discriminator(leaf))
        adversarial = adversarial_term.mean()
        (adversarial_gradient,) = torch.autograd.grad(adversarial, leaf)  # (B, C, H, W)
        likelihood_gradient = torch.zeros_like(leaf)
        if likelihood.requires_grad:  # false where both of its weights are 0
            (likelihood_gradient,) = torch.autograd.grad(likelihood, leaf)
        ratio = None
        weight = torch.tensor(self.config.adversarial_weight, dtype=leaf.dtype, device=leaf.device)
        if self.config.adversarial_balance == "adaptive":
            ratio = self._adaptive_weight(
                likelihood_gradient, adversarial_gradient, output.features, last_layer, average
            )
            weight = weight * ratio
        gradient = likelihood_gradient + weight * adversarial_gradient

        surrogate = (widened(output.reconstructions) * gradient).sum() + weighted_kl
        value = likelihood + weight * adversarial + weighted_kl
        loss = surrogate + (value - surrogate).detach()  # the gradient of the one, the value of the other
        return GeneratorLoss(loss, _detached({**terms, "kl": kl_term, "adversarial": adversarial_term}), ratio)

    def discriminator(self, discriminator: nn.Module, images: Tensor, reconstructions: Tensor) -> DiscriminatorLoss:
        """The discriminator's loss on real images and detached reconstructions, (B, C, H, W) each.

        `discriminator` is the wrapped module, called once on both halves: DistributedDataParallel wants one forward.
        """
        fakes = widened(reconstructions.detach())
        logits = widened(discriminator(torch.cat([images.to(fakes.dtype), fakes])))  # (2B, 1, h', w')
        real, fake = logits.chunk(2)
        term = hinge_discriminator(real, fake)
        with torch.no_grad():
            accuracy = torch.cat([real > 0, fake < 0]).to(logits.dtype).mean()
        return DiscriminatorLoss(
            loss=term.mean(),
            terms={"discriminator": term.detach()},
            watched={
                "real_logits": real.detach().mean(),
                "fake_logits": fake.detach().mean(),
                "accuracy": accuracy,
            },
        )

    def _likelihood(self, images: Tensor, reconstructions: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The terms that compare two images, (B,) each, and their weighted mean (LDM's `nll_loss`)."""
        pixel = l1 if self.config.reconstruction == "l1" else l2
        terms = {"reconstruction": pixel(images, reconstructions)}
        total = self.config.reconstruction_weight * terms["reconstruction"].mean()
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(images, reconstructions)
            total = total + self.config.perceptual_weight * terms["perceptual"].mean()
        return terms, total

    def _adaptive_weight(
        self,
        likelihood_gradient: Tensor,
        adversarial_gradient: Tensor,
        features: Tensor,
        last_layer: nn.Conv2d,
        average: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """|d likelihood / d w| / (|d adversarial / d w| + eps), clamped; w: weights of the last layer. => 0-dim

        Esser et al. 2021 (VQGAN), eq. 7. Both weight gradients follow from the layer's input and the gradients at its
        output, so no backward through the network is needed; they are computed by one convolution.
        """
        if last_layer.padding_mode != "zeros" or isinstance(last_layer.padding, str) or last_layer.groups != 1:
            raise ValueError(f"the adaptive weight knows plain zero-padded convolutions, not {last_layer}")
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            stacked = torch.cat([likelihood_gradient, adversarial_gradient], dim=1)  # (B, 2C, H, W)
            channels, *kernel = last_layer.weight.shape
            gradients = average(
                conv2d_weight(
                    features.detach().to(stacked.dtype),  # (B, C0, H, W)
                    torch.Size([2 * channels, *kernel]),
                    stacked,
                    stride=last_layer.stride,
                    padding=last_layer.padding,
                    dilation=last_layer.dilation,
                )
            )
            likelihood_norm, adversarial_norm = (half.norm() for half in gradients.chunk(2))
            return (likelihood_norm / (adversarial_norm + self.config.adaptive_eps)).clamp(0, self.config.adaptive_max)


def _detached(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: term.detach() for name, term in terms.items()}
