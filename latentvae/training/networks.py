"""The networks of a run, made ready to be trained: where they lie, what of them trains, and with which optimizer."""

import torch
from torch import nn

from latentvae.losses.config import LossConfig
from latentvae.losses.likelihood import LearnedLogvar
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.training.checkpoints import AUTOENCODER, TrainedNetwork
from latentvae.training.config import TrainingConfig
from latentvae.training.lora import add_lora
from latentvae.training.optim import make_optimizer
from latentvae.training.posterior_sigma import fix_posterior
from latentvae.training.trainable import select_trainable


def select(vae: AutoencoderKL, config: TrainingConfig) -> None:
    """Decide which parameters of a model train, before it is moved; adds what trains beside them.

    Raises:
        UserError: `training.trainable`, `training.lora` or `training.posterior_sigma` does not fit the model.
    """
    if config.lora is not None:
        add_lora(vae, config.lora, config.seed)
    else:
        select_trainable(vae, config.trainable)
    if config.posterior_sigma is not None:
        fix_posterior(vae, config.posterior_sigma)


def trained_modules(
    vae: AutoencoderKL, discriminator: nn.Module | None, config: TrainingConfig, loss: LossConfig, device: torch.device
) -> dict[str, nn.Module]:
    """Bring everything that trains to the device and `select` what does; changes the modules given."""
    select(vae, config)
    if config.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    modules: dict[str, nn.Module] = {AUTOENCODER: vae}
    if discriminator is not None:
        modules["discriminator"] = discriminator
    if loss.likelihood == "learned":
        modules["likelihood"] = LearnedLogvar().to(next(vae.parameters()).dtype)
    for module in modules.values():
        module.to(device)
        if config.channels_last:
            module.to(memory_format=torch.channels_last)
    return modules


def with_optimizers(modules: dict[str, nn.Module], config: TrainingConfig) -> dict[str, TrainedNetwork]:
    """Each module with the optimizer of its trainable parameters."""
    return {
        name: TrainedNetwork(
            module,
            make_optimizer(
                module.named_parameters(),
                learning_rate=config.learning_rate,
                betas=config.betas,
                weight_decay=config.weight_decay,
            ),
        )
        for name, module in modules.items()
    }
