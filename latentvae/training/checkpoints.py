"""One checkpoint: everything that a resumed run needs to give bit for bit what an uninterrupted one gives.

    <images_seen>/model/                           the trained weights, a diffusers folder
    <images_seen>/ema/                             their average, a diffusers folder (where EMA is on)
    <images_seen>/<network>.safetensors            discriminator, learned likelihood (where there is one)
    <images_seen>/adapter.safetensors              with LoRA: its matrices, which are merged in model/ and ema/;
    <images_seen>/adapter_ema.safetensors          and their average
    <images_seen>/<network>_optimizer.safetensors  exp_avg and exp_avg_sq by parameter name
    <images_seen>/state.json                       images_seen, step counts, scaler, optimizer scalars, recipe

Noise, augmentation and the order of the data are keyed by (seed, position), so images_seen is their whole state.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from latentvae.checkpoint import load_model, save_model
from latentvae.errors import UserError
from latentvae.files import atomic_folder, write_json
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.training.ema import ExponentialMovingAverage
from latentvae.training.lora import adapter_state, has_adapter, load_adapter_state, plain_model
from latentvae.training.optim import load_optimizer_tensors, optimizer_tensors
from latentvae.training.record import changes
from latentvae.training.run_dir import STATE_FILE

logger = logging.getLogger("latentvae")

AUTOENCODER = "autoencoder"  # of the networks; the others are files beside it
ADAPTER_FILE, ADAPTER_AVERAGE_FILE = "adapter.safetensors", "adapter_ema.safetensors"


@dataclass(frozen=True)
class TrainedNetwork:
    """A network with the optimizer that trains it; `optimizer` is the plain torch one."""

    module: nn.Module
    optimizer: torch.optim.Optimizer

    def trained(self) -> list[nn.Parameter]:
        """The parameters that the optimizer updates."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]


def save_checkpoint(
    folder: Path,
    *,
    vae: AutoencoderKL,
    ema: ExponentialMovingAverage | None,
    networks: dict[str, TrainedNetwork],
    state: dict[str, Any],
) -> None:
    """Write the whole checkpoint beside `folder` and rename it into place."""
    with atomic_folder(folder, overwrite=True) as temporary:
        save_model(plain_model(vae), temporary / "model")
        if has_adapter(vae):
            save_file(adapter_state(vae), temporary / ADAPTER_FILE)
        if ema is not None:
            with ema.applied():
                save_model(plain_model(vae), temporary / "ema")
                if has_adapter(vae):
                    save_file(adapter_state(vae), temporary / ADAPTER_AVERAGE_FILE)
        for name in networks.keys() - {AUTOENCODER}:
            weights = networks[name].module.state_dict()
            contiguous = {key: tensor.contiguous() for key, tensor in weights.items()}
            save_file(contiguous, temporary / f"{name}.safetensors")
        scalars = {}
        for name, network in networks.items():
            tensors, scalars[name] = optimizer_tensors(network.optimizer, network.module.named_parameters())
            save_file(tensors, temporary / f"{name}_optimizer.safetensors")
        write_json(temporary / STATE_FILE, state | {"optimizers": scalars})


def read_state(folder: Path) -> dict[str, Any]:
    """What state.json of a checkpoint says; UserError where it cannot be read."""
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be resumed from: {error}") from error
    if not isinstance(state, dict) or not {"images_seen", "seconds", "metrics", "scaler", "recipe"} <= state.keys():
        raise UserError(f"{folder} cannot be resumed from: its {STATE_FILE} was not written by a training run")
    return state


def load_checkpoint(
    folder: Path,
    state: dict[str, Any],
    *,
    networks: dict[str, TrainedNetwork],
    ema: ExponentialMovingAverage | None,
    scaler: Any = None,
) -> None:
    """Fill networks, optimizers, average and fp16 loss scaler in place; `state` is what `read_state` gave.

    Raises:
        UserError: a file is missing or damaged, or was made by a run with other networks.
    """
    vae: Any = networks[AUTOENCODER].module
    _load_weights(folder, vae)
    if scaler is not None and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    try:
        if set(state["optimizers"]) != set(networks):
            raise UserError(
                f"{folder} holds {sorted(state['optimizers'])}, this recipe trains {sorted(networks)}: "
                "resume with the recipe of the run (recipe.yaml beside its checkpoints)"
            )
        for name in networks.keys() - {AUTOENCODER}:
            networks[name].module.load_state_dict(load_file(folder / f"{name}.safetensors"))
        for name, network in networks.items():
            tensors = load_file(folder / f"{name}_optimizer.safetensors")
            named = network.module.named_parameters()
            load_optimizer_tensors(network.optimizer, named, tensors, state["optimizers"][name])
        if ema is not None:
            if not (folder / "ema").is_dir():
                raise UserError(f"{folder} holds no average of the weights: resume with training.ema_decay=0")
            if has_adapter(vae):
                averages = dict(vae.named_parameters()) | load_file(folder / ADAPTER_AVERAGE_FILE)
            else:
                average = load_model(folder / "ema", torch_dtype=next(vae.parameters()).dtype)
                averages = dict(average.named_parameters())
            ema.load_state_dict(averages, state["ema_updates"])
    except UserError:
        raise
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise UserError(f"{folder} cannot be resumed from: {str(error).splitlines()[0]}") from error


def _load_weights(folder: Path, vae: AutoencoderKL) -> None:
    """Copy the autoencoder of a checkpoint into `vae`, exactly: weights, or with LoRA its matrices; measured scaling.

    Raises:
        UserError: there is no such model, or one of another architecture.
    """
    if has_adapter(vae):
        try:
            load_adapter_state(vae, load_file(folder / ADAPTER_FILE))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder} cannot be resumed from: {str(error).splitlines()[0]}") from error
        return
    dtype = next(vae.parameters()).dtype
    saved = load_model(folder / "model", torch_dtype=dtype)
    try:
        vae.load_state_dict(saved.state_dict())
    except RuntimeError as error:
        raise UserError(f"{folder} holds a model of another architecture than the recipe's: {error}") from error
    vae.register_to_config(
        scaling_factor=saved.config.scaling_factor,
        shift_factor=saved.config.shift_factor,
        latents_mean=saved.config.latents_mean,
        latents_std=saved.config.latents_std,
    )


def compare_settings(folder: Path, state: dict[str, Any], settings: dict[str, Any]) -> None:
    """Say what changed in the recipe since a checkpoint was made; UserError where it is of another model."""
    changed = sorted(changes(state["recipe"], settings))
    of_model = (
        "model.",
        "training.posterior_sigma:",
    )  # the sigma lies in weights, which the checkpoint would bring back
    # Where a starting model lies may change: `StartingModel.require_same` asks whether it is the same.
    is_tuned = all(recipe["model"].get("start_from") is not None for recipe in (state["recipe"], settings))
    where = ("model.start_from:", "model.subfolder:", "model.revision:", "model.variant:") if is_tuned else ()
    architecture = [line for line in changed if line.startswith(of_model) and not line.startswith(where)]
    if architecture:
        raise UserError(f"{folder} was made with another model: {'; '.join(architecture)}; use another --out")
    for line in changed:
        logger.warning("changed since the checkpoint: %s", line)
