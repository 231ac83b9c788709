"""The optimizers of all networks, stepped together: learning rates, clipping, the fp16 loss scale."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from latentvae.training.checkpoints import TrainedNetwork
from latentvae.training.config import TrainingConfig
from latentvae.training.nonfinite import NonFiniteLoss
from latentvae.training.optim import learning_rate_at, set_learning_rate

MIN_LOSS_SCALE = 2.0**-10  # of the 65536 that it starts from; only gradients that are never finite bring it here


@dataclass(frozen=True)
class Optimizers:
    """`networks` by name; `scaler` where the autocast is fp16.

    None of this is left to Accelerate: its clipping would unscale the gradients of all networks once for each, and each
    of its optimizers would renew the loss scale, after which the next unscales its gradients a second time.
    """

    config: TrainingConfig
    networks: Mapping[str, TrainedNetwork]
    scaler: torch.amp.GradScaler | None

    def set_learning_rates(self, images_seen: int, progress: float) -> float:
        """For the step after `images_seen` images and the finished share `progress` of the run; the autoencoder's."""
        config = self.config
        rates = {}
        for name, network in self.networks.items():
            peak = config.learning_rate
            if name == "discriminator" and config.discriminator_learning_rate is not None:
                peak = config.discriminator_learning_rate
            rates[name] = learning_rate_at(
                images_seen + config.global_batch_size,
                learning_rate=peak,
                warmup_images=config.warmup_images,
                total_images=config.total_images,
                schedule=config.schedule,
                final_learning_rate=config.final_learning_rate,
                progress=progress,
            )
            set_learning_rate(network.optimizer, rates[name])
        return rates["autoencoder"]

    def clip(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Clip the gradients of these networks, each by its own norm; returns the norms before that."""
        norms = {}
        for name in names:
            network = self.networks[name]
            if self.scaler is not None:
                self.scaler.unscale_(network.optimizer)
            norms[name] = torch.nn.utils.clip_grad_norm_(network.trained(), self.config.max_grad_norm)
        return norms

    def step(self, norms: Mapping[str, Tensor]) -> bool:
        """Step every clipped network, and renew the fp16 loss scale once, after the last of them.

        Returns False where the scaler skipped the autoencoder's step. Raises NonFiniteLoss where no scale helps.
        """
        for name in norms:
            optimizer = self.networks[name].optimizer
            if self.scaler is None:
                optimizer.step()
            else:
                self.scaler.step(optimizer)
        self.clear()
        if self.scaler is None or not norms:
            return True
        self.scaler.update()
        if self.scaler.get_scale() < MIN_LOSS_SCALE:
            raise NonFiniteLoss(
                f"the fp16 loss scale fell below {MIN_LOSS_SCALE:g}, so gradients overflow at any scale: the "
                "checkpoints are untouched. Try a lower training.learning_rate or training.mixed_precision=no"
            )
        return "autoencoder" not in norms or bool(norms["autoencoder"].isfinite())

    def throw_away(self) -> None:
        """Leave the step out: drop the gradients of all networks."""
        self.clear()
        if self.scaler is not None:
            self.scaler.update()  # it unscaled these gradients, and refuses to do so twice

    def clear(self) -> None:
        """No parameter has a gradient any more."""
        for network in self.networks.values():
            network.optimizer.zero_grad()
