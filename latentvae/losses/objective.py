"""What the autoencoder and the discriminator minimise: the terms, their weights, and when each of them is on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from latentvae.losses.adaptive import adaptive_weight
from latentvae.losses.config import LossConfig
from latentvae.losses.extra import LoadedTerm, load_terms
from latentvae.losses.likelihood import learned_nll, optimal_logvar, optimal_nll
from latentvae.losses.perceptual import Perceptual
from latentvae.losses.schedule import kl_weight_at
from latentvae.losses.structural import ssim
from latentvae.losses.terms import (
    anchor_distance,
    charbonnier,
    hinge_discriminator,
    hinge_generator,
    kl,
    l1,
    l2,
    non_saturating_discriminator,
    non_saturating_generator,
    widened,
)


class StepTensors(Protocol):
    """What one forward of the autoencoder gives."""

    @property
    def moments(self) -> Tensor: ...  # (B, 2c, h, w)
    @property
    def reconstructions(self) -> Tensor: ...  # (B, C, H, W)
    @property
    def features(self) -> Tensor: ...  # (B, C0, H, W), the input of the last convolution
    @property
    def logvar(self) -> Tensor | None: ...  # 0-dim, what LearnedLogvar gives; None where the likelihood is not learned


@dataclass(frozen=True)
class GeneratorLoss:
    """`loss.backward()` gives the whole gradient of the batch mean; its value is the composed loss.

    `terms`: unweighted and detached, (B,) each; "kl" is the true divergence, without free bits, and "logvar" what a
    likelihood divides errors by: log variance or log scale. `adaptive_weight`: the clamped ratio of gradient norms
    before `adversarial_weight` multiplies it, 0-dim; None where the adversarial term is off or its balance constant.
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

    def __init__(
        self,
        config: LossConfig,
        perceptual: Perceptual | None = None,
        extra: Sequence[LoadedTerm] = (),
        latent_scale: float | Sequence[float] = 1.0,
    ) -> None:
        """`config` must be resolved where it has an adversarial term or a KL schedule.

        Args:
            perceptual: where `config` has LPIPS.
            extra: the loaded terms of `config.extra`.
            latent_scale: what latents are multiplied by to be normalized, one or one per channel; the anchor measures
                in latents scaled by it.
        """
        if config.has_perceptual != (perceptual is not None):
            raise ValueError(f"loss.perceptual={config.perceptual} and the perceptual module given do not agree")
        if len(extra) != len(config.extra):
            raise ValueError(f"loss.extra names {len(config.extra)} terms, {len(extra)} are given")
        if config.has_adversarial and (config.discriminator_start is None or config.adversarial_start is None):
            raise ValueError("the starts of the adversarial loss are open: call LossConfig.resolved(total_images)")
        kl_weight_at(config, 0)  # raises where its schedule is open
        self.config = config
        self.perceptual = perceptual
        self.extra = tuple(extra)
        self.latent_scale = latent_scale

    @classmethod
    def from_config(
        cls,
        config: LossConfig,
        *,
        channels: int = 3,
        device: torch.device | str = "cpu",
        latent_scale: float | Sequence[float] = 1.0,
    ) -> Self:
        """Build the perceptual module and the extra terms too.

        Raises UserError where the weights or bands of LPIPS are missing, or an extra term cannot be had.
        """
        perceptual = None
        if config.has_perceptual and config.perceptual != "none":
            perceptual = Perceptual(config.perceptual, channels=channels, bands=config.perceptual_bands).to(device)
        return cls(config, perceptual, load_terms(config.extra, device), latent_scale)

    def active_autoencoder(self, images_seen: int) -> bool:
        """Whether the autoencoder trains on the batch that follows `images_seen` images."""
        return images_seen >= self.config.autoencoder_start

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
        anchor: Tensor | None = None,
    ) -> GeneratorLoss:
        """The autoencoder's loss: images [-1, 1] (B, C, H, W) and one forward's output => a mean over the batch.

        Args:
            images: what the reconstructions shall be; where latents were shrunk or turned, so are these. Moments belong
                to the images as they were encoded.
            discriminator: the plain module, not the wrapped one: only the gradient at its input is taken, so its
                parameters and their hooks stay out of it.
            average: mean over processes of a small tensor.
            anchor: raw posterior means of the starting encoder for the encoded images, (B, c, h, w).
        """
        latent_terms, latent_loss = self._latent_loss(output.moments, images_seen, anchor)
        logvar = self._logvar(output)
        if not self.active_adversarial(images_seen):
            reconstructions = widened(output.reconstructions)
            terms, likelihood = self._likelihood(images, reconstructions, output.moments, logvar)
            return GeneratorLoss(likelihood + latent_loss, _detached(terms | latent_terms), None)
        if discriminator is None or isinstance(discriminator, DistributedDataParallel):
            raise TypeError(f"the adversarial term needs the plain discriminator, not {type(discriminator).__name__}")

        # One backward through the autoencoder: gradients at its outputs are taken on leaf copies of them and joined.
        reconstructions = widened(output.reconstructions)
        leaf = reconstructions.detach().requires_grad_()  # (B, C, H, W)
        moments, scale = _leaf(output.moments), None if logvar is None else _leaf(logvar)
        terms, likelihood = self._likelihood(images, leaf, moments, scale)
        likelihood.backward(inputs=[x for x in (leaf, moments, scale) if x is not None and x.requires_grad])
        likelihood_gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad

        is_hinge = self.config.adversarial_loss == "hinge"
        adversarial_term = (hinge_generator if is_hinge else non_saturating_generator)(discriminator(leaf))
        adversarial = adversarial_term.mean()
        (adversarial_gradient,) = torch.autograd.grad(adversarial, leaf)  # (B, C, H, W)
        ratio = None
        weight = torch.tensor(self.config.adversarial_weight, dtype=leaf.dtype, device=leaf.device)
        if self.config.adversarial_balance == "adaptive":
            ratio = adaptive_weight(
                likelihood_gradient,
                adversarial_gradient,
                output.features,
                last_layer,
                average,
                eps=self.config.adaptive_eps,
                maximum=self.config.adaptive_max,
            )
            weight = weight * ratio

        gradient = likelihood_gradient + weight * adversarial_gradient
        surrogate = (reconstructions * gradient).sum() + latent_loss
        if moments.grad is not None:  # an extra term looks at them
            surrogate = surrogate + (output.moments * moments.grad).sum()
        if logvar is not None and scale is not None and scale.grad is not None:
            surrogate = surrogate + logvar * scale.grad
        value = likelihood.detach() + weight * adversarial.detach() + latent_loss
        loss = surrogate + (value - surrogate).detach()  # the gradient of the one, the value of the other
        return GeneratorLoss(loss, _detached(terms | latent_terms | {"adversarial": adversarial_term}), ratio)

    def discriminator(self, discriminator: nn.Module, images: Tensor, reconstructions: Tensor) -> DiscriminatorLoss:
        """The discriminator's loss on real images and detached reconstructions, (B, C, H, W) each.

        `discriminator` is the wrapped module, called once on both halves: DistributedDataParallel wants one forward.
        """
        fakes = widened(reconstructions.detach())
        logits = widened(discriminator(torch.cat([images.to(fakes.dtype), fakes])))  # (2B, 1, h', w')
        real, fake = logits.chunk(2)
        is_hinge = self.config.adversarial_loss == "hinge"
        term = (hinge_discriminator if is_hinge else non_saturating_discriminator)(real, fake)
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

    def _latent_loss(
        self, moments: Tensor, images_seen: int, anchor: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The terms of the posterior alone, (B,) each, and their weighted mean."""
        config = self.config
        terms = {"kl": kl(moments)}
        pressed = kl(moments, config.free_bits) if config.free_bits else terms["kl"]
        total = kl_weight_at(config, images_seen) * pressed.mean()
        if anchor is not None:
            terms["anchor"] = anchor_distance(moments, anchor, self.latent_scale)
            total = total + config.anchor_weight * terms["anchor"].mean()
        elif config.anchor_weight:
            raise ValueError("loss.anchor_weight is set, but the starting encoder's posterior means are not given")
        return terms, total

    def _logvar(self, output: StepTensors) -> Tensor | None:
        if self.config.likelihood != "learned":
            return None
        if output.logvar is None:
            raise ValueError("loss.likelihood is learned, but the step gave no logvar: it needs a LearnedLogvar")
        return widened(output.logvar)

    def _likelihood(
        self, images: Tensor, reconstructions: Tensor, moments: Tensor, logvar: Tensor | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The terms of the reconstructions, (B,) each, and the mean of what the likelihood makes of them: LDM's nll."""
        config, kind = self.config, self.config.reconstruction
        if kind == "charbonnier":
            pixel = charbonnier(images, reconstructions, config.charbonnier_eps)
        else:
            pixel = (l1 if kind == "l1" else l2)(images, reconstructions)
        terms = {"reconstruction": pixel}
        beside = torch.zeros_like(pixel)  # (B,), the weighted errors that no density is known for
        if config.ssim_weight:
            terms["ssim"] = 1 - ssim(images, reconstructions)
            beside = beside + config.ssim_weight * terms["ssim"]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(images, reconstructions)
            beside = beside + config.perceptual_weight * terms["perceptual"]
        for term in self.extra:
            terms[term.name] = term(widened(images), reconstructions, widened(moments))
            beside = beside + term.weight * terms[term.name]
        if config.likelihood == "optimal":  # the variance is that of pixels; the other errors stay as they are
            terms["logvar"] = optimal_logvar(pixel, kind)
            return terms, (config.reconstruction_weight * optimal_nll(pixel, kind) + beside).mean()
        errors = config.reconstruction_weight * pixel + beside
        if logvar is None:
            return terms, errors.mean()
        terms["logvar"] = logvar.expand(len(errors))
        return terms, learned_nll(errors, logvar).mean()


def _detached(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: term.detach() for name, term in terms.items()}


def _leaf(x: Tensor) -> Tensor:
    """A copy outside the graph that can take a gradient where `x` can."""
    return x.detach().requires_grad_(x.requires_grad)
