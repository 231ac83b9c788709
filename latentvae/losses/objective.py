"""What the autoencoder and the discriminator minimise: the terms, their weights, and when each of them is on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, Self

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight
from torch.nn.parallel import DistributedDataParallel

from latentvae.losses.discriminator import DiscriminatorConfig
from latentvae.losses.perceptual import Perceptual, PerceptualNet
from latentvae.losses.terms import hinge_discriminator, hinge_generator, kl, l1, l2, widened

DISCRIMINATOR_START = 0.375  # of the run: RAE starts its discriminator at epoch 6 of 16
ADVERSARIAL_START = 0.5  # of the run: RAE's generator meets it at epoch 8 of 16


class LossConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Every term is the mean over its elements, so weights mean the same at any resolution and batch size."""

    reconstruction: Literal["l1", "l2"] = Field(
        default="l1", description="pixel term: mean absolute or mean squared error"
    )
    reconstruction_weight: float = Field(default=1.0, ge=0, description="weight of the pixel term (LDM: 1)")
    perceptual: PerceptualNet | Literal["none"] = Field(
        default="vgg",
        description="LPIPS backbone; its ImageNet weights come from torch's cache or a download "
        "(vgg 528 MB, alex 233 MB, squeeze 5 MB)",
    )
    perceptual_weight: float = Field(default=1.0, ge=0, description="weight of LPIPS (LDM: 1; sd-vae-ft-mse: 0.1)")
    perceptual_bands: tuple[tuple[int, int, int], ...] | None = Field(
        default=None,
        min_length=1,
        description="for images neither RGB nor gray: channel triplets shown to LPIPS as R, G, B",
    )
    kl_weight: float = Field(
        default=2.08e-8,
        ge=0,
        description="weight of the KL term, nats per latent element; LDM's 1e-6 is 2.08e-8 at f8c4",
    )
    adversarial_weight: float = Field(
        default=0.0, ge=0, description="0 is off; LDM: 0.5 with the adaptive balance; REPA-E: 0.1 with the constant one"
    )
    adversarial_balance: Literal["adaptive", "constant"] = Field(
        default="adaptive",
        description="adaptive: the weight is multiplied by a ratio of gradient norms at the last layer (LDM)",
    )
    adaptive_max: float = Field(
        default=0.051, gt=0, description="upper bound of that ratio; LDM's 1e4 is 0.051 at 256 px"
    )
    adaptive_eps: float = Field(
        default=1e-4, gt=0, description="added to the adversarial gradient norm in that ratio (LDM)"
    )
    discriminator_start: int | None = Field(
        default=None,
        ge=0,
        description="images seen before the discriminator trains; null: 37.5 percent of the run (RAE)",
    )
    adversarial_start: int | None = Field(
        default=None, ge=0, description="images seen before the decoder feels it; null: 50 percent of the run (RAE)"
    )
    discriminator: DiscriminatorConfig = Field(default=DiscriminatorConfig(), description="size of the discriminator")

    @model_validator(mode="after")
    def _check_starts(self) -> Self:
        early, late = self.discriminator_start, self.adversarial_start
        if early is not None and late is not None and late < early:
            raise ValueError(
                f"adversarial_start {late} is before discriminator_start {early}: an untrained discriminator would "
                "harm the decoder; start it later"
            )
        return self

    @property
    def has_perceptual(self) -> bool:
        return self.perceptual != "none" and self.perceptual_weight > 0

    @property
    def has_adversarial(self) -> bool:
        return self.adversarial_weight > 0

    def resolved(self, total_images: int) -> Self:
        """The same with both starts in images; a start that was given is kept, and the other never contradicts it."""
        early, late = self.discriminator_start, self.adversarial_start
        if early is None:
            early = round(DISCRIMINATOR_START * total_images)
            early = early if late is None else min(early, late)
        if late is None:
            late = max(round(ADVERSARIAL_START * total_images), early)
        return self.model_copy(update={"discriminator_start": early, "adversarial_start": late})


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
