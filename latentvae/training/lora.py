"""Low-rank updates of a frozen autoencoder by peft (Hu et al. 2022, "LoRA", eq. 3): W x + alpha / r * B A x.

For a convolution A is one to `rank` channels with the same kernel, stride and padding, and B a 1 x 1 convolution
after it. While a model carries an adapter, its parameters are named `<layer>.base_layer.weight`,
`<layer>.lora_A.default.weight` and `<layer>.lora_B.default.weight`; what is shipped has the updates merged into the
plain names.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from latentvae.errors import UserError
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.training.config import LoRAConfig
from latentvae.training.trainable import matching

ADAPTER = "default"  # peft's name of the only one
LAST_LAYER = "decoder.conv_out"  # stays plain: the adaptive adversarial weight is taken at it
_BASE = ".base_layer."


def lora_targets(vae: AutoencoderKL, patterns: tuple[str, ...] | None) -> list[str]:
    """The names of the layers that get an update, in the model's order.

    Args:
        patterns: regular expressions, of which one must match the whole name of a convolution or projection; None: all
            of the decoder. The decoder's last layer never gets one.

    Raises:
        UserError: a regular expression that is none, or that matches no such layer.
    """
    layers = [
        name for name, module in vae.named_modules() if isinstance(module, nn.Conv2d | nn.Linear) and name != LAST_LAYER
    ]
    if patterns is None:
        return [name for name in layers if name.startswith("decoder.")]
    what = f"convolution or projection ({LAST_LAYER} is left out: it stays plain)"
    chosen = matching(patterns, layers, field="training.lora.targets", what=what)
    return [name for name in layers if name in chosen]


def add_lora(vae: AutoencoderKL, config: LoRAConfig, seed: int) -> None:
    """Put updates that are zero at first into `vae`, in place; afterwards only they train.

    A is uniform in +-1 / sqrt(its inputs), as peft draws it, from `seed` alone; B is zero. So the model computes what
    it did, and every process starts alike.

    Raises:
        UserError: peft is absent, the model has an adapter already, or targets match nothing.
    """
    if has_adapter(vae):
        raise UserError("the model carries an adapter already: merge or remove it before another is trained")
    targets = lora_targets(vae, config.targets)
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UserError("training.lora needs the package peft: pip install 'latentvae[lora]'") from error
    alpha = float(config.rank) if config.alpha is None else config.alpha
    settings: dict[str, Any] = {"r": config.rank, "lora_alpha": alpha}
    # One expression for all: peft shortens long lists of names to what they end with.
    settings["target_modules"] = "|".join(map(re.escape, targets))
    with torch.random.fork_rng(devices=[]):  # peft draws weights too
        vae.add_adapter(LoraConfig(**settings), adapter_name=ADAPTER)
    generator = torch.Generator().manual_seed(seed)
    for layer in _adapted(vae).values():
        # The input is in the dtype of the weights, or autocast converts it: peft's own conversion only costs time.
        layer.cast_input_dtype_enabled = False
        weight = layer.lora_A[ADAPTER].weight
        bound = 1 / math.sqrt(weight[0].numel())
        drawn = torch.empty(weight.shape).uniform_(-bound, bound, generator=generator)  # float32 on a CPU, for all
        with torch.no_grad():
            weight.copy_(drawn)


def has_adapter(model: nn.Module) -> bool:
    """Whether a peft adapter sits in the model."""
    return bool(getattr(model, "peft_config", None))


def _adapted(vae: AutoencoderKL) -> dict[str, Any]:
    """Layers with an update by name."""
    return {name: module for name, module in vae.named_modules() if hasattr(module, "lora_A")}


def plain_model(vae: AutoencoderKL) -> AutoencoderKL:
    """`vae` itself where it has no adapter, else a new model with the updates merged: same dtype, device and mode.

    Products are formed in float64 (float32 on MPS, which has nothing wider) and rounded once, whatever precision the
    device multiplies in.
    """
    if not has_adapter(vae):
        return vae
    adapted = _adapted(vae)
    state: dict[str, Tensor] = {}
    for name, tensor in vae.state_dict().items():
        if ".lora_" in name:
            continue
        layer, _, rest = name.partition(_BASE)
        if layer in adapted and rest == "weight":
            tensor = _merged(tensor, adapted[layer])
        state[f"{layer}.{rest}" if rest else name] = tensor.detach().clone()
    with torch.device("meta"):
        plain: AutoencoderKL = AutoencoderKL.from_config(vae.config)
    plain.load_state_dict(state, assign=True)
    return plain.requires_grad_(False).train(vae.training)


@torch.no_grad()
def _merged(weight: Tensor, layer: Any) -> Tensor:
    """weight + scale * B A of one layer, in the dtype and layout of `weight`."""
    down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight  # (r, I[, k, k]), (O, r[, 1, 1])
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    update = (up.flatten(1).to(wide) @ down.flatten(1).to(wide)).reshape(weight.shape) * layer.scaling[ADAPTER]
    return torch.empty_like(weight).copy_(weight.to(wide) + update)


def adapter_state(vae: AutoencoderKL) -> dict[str, Tensor]:
    """The weights of the updates by parameter name, contiguous copies for safetensors; {} where there are none."""
    return {
        name: parameter.detach().clone(memory_format=torch.contiguous_format)
        for name, parameter in vae.named_parameters()
        if ".lora_" in name
    }


@torch.no_grad()
def load_adapter_state(vae: AutoencoderKL, state: Mapping[str, Tensor]) -> None:
    """Put back what `adapter_state` gave, bit for bit, into a model that `add_lora` prepared alike.

    Raises:
        UserError: the updates are of other layers, of another rank or dtype.
    """
    own = {name: parameter for name, parameter in vae.named_parameters() if ".lora_" in name}
    differing = sorted(own.keys() ^ state.keys())
    if differing:
        raise UserError(
            f"the saved adapter has {len(state)} weights, the model's {len(own)}; they differ in {differing[0]}: "
            "resume with the training.lora of the run"
        )
    for name, parameter in own.items():
        saved = state[name]
        if saved.shape != parameter.shape or saved.dtype != parameter.dtype:
            raise UserError(
                f"the saved adapter's {name} is {tuple(saved.shape)} {saved.dtype}, the model's "
                f"{tuple(parameter.shape)} {parameter.dtype}: resume with the training.lora of the run"
            )
    for name, parameter in own.items():
        parameter.copy_(state[name])
