"""What a user would run instead: a plain implementation of the training recipe that diffusers publishes.

It does what diffusers' examples/research_projects/autoencoderkl/train_autoencoderkl.py does (as of commit e276f08):
diffusers' own network; a pixel term plus 0.5 LPIPS and 1e-6 KL, summed over an image's elements; taming-transformers'
PatchGAN with batch norm and the hinge loss; LDM's adaptive weight by two more backward passes to the last layer; AdamW
at a constant rate; clipping at 1; from the start of the discriminator on, the autoencoder and the discriminator learn
on alternate batches; images resized and cut out in the middle.

That script has mistakes that only harm it. `as_published=True` keeps them; the default mends them, so that a comparison
says nothing about bugs:

    LPIPS runs without gradient, so that it trains nothing           => with gradient
    fakes are not detached in the discriminator's step, and no        => the autoencoder runs without gradient there,
      gradient is cleared before the other network's step               and each step starts from cleared gradients
    weights are cast to bf16                                          => float32 weights, autocast of the networks
    the adversarial term is computed before its start, times zero     => not computed

The script runs on Accelerate; one process needs nothing of it, so plain PyTorch stands here.
"""

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class PlainConfig:
    """The script's arguments; defaults are the script's, but for the backbone of LPIPS (`vgg` there).

    `discriminator_start`: images seen before it starts; None: never. The script says 50,001 batches of 4.
    """

    precision: Literal["fp32", "bf16"] = "fp32"
    as_published: bool = False
    reconstruction: Literal["l1", "l2"] = "l2"
    perceptual: str = "squeeze"  # or vgg, alex, none
    perceptual_scale: float = 0.5
    kl_scale: float = 1e-6  # of sums over an image's elements
    discriminator_start: int | None = 4 * 50_001
    discriminator_scale: float = 1.0
    learning_rate: float = 4.5e-6
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0


def patch_discriminator(width: int = 64, num_layers: int = 3) -> nn.Sequential:
    """taming-transformers' NLayerDiscriminator: images (B, 3, H, W) => logits of overlapping patches (B, 1, h', w')."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
    channels = width
    for index in range(1, num_layers + 1):
        previous, channels = channels, width * min(2**index, 8)
        stride = 2 if index < num_layers else 1
        layers.append(nn.Conv2d(previous, channels, 4, stride=stride, padding=1, bias=False))
        layers += [nn.BatchNorm2d(channels), nn.LeakyReLU(0.2, inplace=True)]
    layers.append(nn.Conv2d(channels, 1, 4, padding=1))
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, 0.0, 0.02)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)
    return nn.Sequential(*layers)


def load_lpips(net: str) -> nn.Module:
    """The `lpips` package's network, as the script makes it; its backbone comes from torch's cache or a download."""
    import lpips

    return lpips.LPIPS(net=net, verbose=False).eval()


class PlainTraining:
    """Owns the networks and their optimizers; `step` learns from one batch.

    Attributes:
        images_seen: images that went through.
        autoencoder_images, discriminator_images: images that each network learned from.
        logs: the last batch's figures, by name.
    """

    def __init__(self, vae: diffusers.AutoencoderKL, config: PlainConfig, device: torch.device | str = "cpu") -> None:
        self.config, self.device = config, torch.device(device)
        half = config.as_published and config.precision == "bf16"
        self.dtype = torch.bfloat16 if half else torch.float32
        self.vae = vae.to(self.device).train()
        self.discriminator = patch_discriminator().to(self.device).train()
        self.perceptual = load_lpips(config.perceptual).to(self.device) if config.perceptual != "none" else None
        if half:
            for network in (self.vae, self.discriminator, self.perceptual):
                if network is not None:
                    network.to(self.dtype)
        self.optimizer, self.discriminator_optimizer = (
            torch.optim.AdamW(
                network.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
            )
            for network in (self.vae, self.discriminator)
        )
        self.images_seen = self.autoencoder_images = self.discriminator_images = 0
        self._batches = 0
        self.logs: dict[str, float] = {}

    def step(self, images: Tensor) -> None:
        """One batch, (B, 3, H, W) in [-1, 1]: the autoencoder learns from it or, after its start, the discriminator."""
        start = self.config.discriminator_start
        adversarial = start is not None and self.images_seen >= start
        images = images.to(self.device, self.dtype)
        if adversarial and self._batches % 2:
            self._discriminator_step(images)
            self.discriminator_images += len(images)
        else:
            self._autoencoder_step(images, adversarial)
            self.autoencoder_images += len(images)
        self.images_seen += len(images)
        self._batches += 1

    def _autocast(self) -> AbstractContextManager[object]:
        is_on = self.config.precision == "bf16" and not self.config.as_published
        return torch.autocast(self.device.type, torch.bfloat16) if is_on else nullcontext()

    def _forward(self, images: Tensor) -> tuple[diffusers.models.autoencoders.vae.DiagonalGaussianDistribution, Tensor]:
        with self._autocast():
            posterior = self.vae.encode(images).latent_dist
            return posterior, self.vae.decode(posterior.sample()).sample

    def _judged(self, images: Tensor) -> Tensor:
        with self._autocast():
            return self.discriminator(images)

    def _autoencoder_step(self, images: Tensor, adversarial: bool) -> None:
        config = self.config
        if not config.as_published:
            self.optimizer.zero_grad()
        posterior, reconstructions = self._forward(images)
        pixel = F.mse_loss if config.reconstruction == "l2" else F.l1_loss
        likelihood = pixel(reconstructions.float(), images.float(), reduction="none")  # (B, 3, H, W)
        self.logs = {}
        if self.perceptual is not None:
            with torch.no_grad() if config.as_published else nullcontext():
                distance = self.perceptual(reconstructions.to(self.dtype), images)  # (B, 1, 1, 1)
            likelihood = likelihood + config.perceptual_scale * distance
            self.logs["perceptual"] = distance.detach().mean().item()
        likelihood = likelihood.sum() / len(images)
        kl = posterior.kl().sum() / len(images)
        loss = likelihood + config.kl_scale * kl
        if adversarial or config.as_published:
            generator = -self._judged(reconstructions).mean()
            weight = self._adaptive_weight(likelihood, generator)
            loss = loss + (weight if adversarial else 0.0) * generator
            self.logs |= {"generator": generator.item(), "adaptive_weight": weight.item()}
        self.logs |= {"loss": loss.item(), "likelihood": likelihood.item(), "kl": kl.item()}
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _adaptive_weight(self, likelihood: Tensor, generator: Tensor) -> Tensor:
        """LDM's ratio of gradient norms at the last layer; each of the two is a backward pass through its own loss."""
        last_layer = self.vae.decoder.conv_out.weight
        (of_likelihood,) = torch.autograd.grad(likelihood, last_layer, retain_graph=True)
        (of_generator,) = torch.autograd.grad(generator, last_layer, retain_graph=True)
        ratio = of_likelihood.norm() / (of_generator.norm() + 1e-4)
        return ratio.clamp(0.0, 1e4).detach() * self.config.discriminator_scale

    def _discriminator_step(self, images: Tensor) -> None:
        if not self.config.as_published:
            self.discriminator_optimizer.zero_grad()
        with nullcontext() if self.config.as_published else torch.no_grad():
            _, reconstructions = self._forward(images)
        real, fake = self._judged(images), self._judged(reconstructions)
        loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        self.logs = {"discriminator": loss.item(), "real": real.detach().mean().item(), "fake": fake.mean().item()}
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.discriminator.parameters(), self.config.max_grad_norm)
        self.discriminator_optimizer.step()
        self.discriminator_optimizer.zero_grad()


def train_plain(
    vae: diffusers.AutoencoderKL,
    config: PlainConfig,
    source: Path,
    *,
    seconds: float,
    resolution: int,
    batch_size: int,
    num_workers: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> PlainTraining:
    """Train on a folder of images for this time, data loading included; the trained model is `vae` itself.

    The shorter side is resized to `resolution` and the middle cut out, as in the script. Folders of images need a
    folder of classes around them (torchvision's ImageFolder).
    """
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    torch.manual_seed(seed)
    cut = [transforms.Resize(resolution), transforms.CenterCrop(resolution), transforms.ToTensor()]
    images = ImageFolder(str(source), transforms.Compose([*cut, transforms.Normalize([0.5], [0.5])]))
    loader = torch.utils.data.DataLoader(
        images, batch_size=batch_size, shuffle=True, num_workers=num_workers, persistent_workers=num_workers > 0
    )
    training = PlainTraining(vae, config, device)
    began = time.monotonic()
    while True:
        for batch, _ in loader:
            training.step(batch)
            if time.monotonic() - began >= seconds:
                return training
