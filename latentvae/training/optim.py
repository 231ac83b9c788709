"""The optimizer, its schedule, its state as named tensors, and the guard against non-finite numbers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from latentvae.errors import UserError

NamedParameters = Iterable[tuple[str, nn.Parameter]]


def make_optimizer(
    named_parameters: NamedParameters,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.AdamW:
    """AdamW over the parameters that require a gradient; norms and biases (one dimension or none) are not decayed.

    Raises UserError where nothing is trainable.
    """
    trainable = [parameter for _, parameter in named_parameters if parameter.requires_grad]
    if not trainable:
        raise UserError("no parameter is trainable: check training.trainable")
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    # The fused kernel is as repeatable as the others and, on a CPU with many small tensors, some twenty times faster.
    fused = all(p.device.type in ("cpu", "cuda") for p in trainable)
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=learning_rate, betas=betas, fused=fused or None
    )
    optimizer.register_step_pre_hook(_match_layouts)
    return optimizer


def _match_layouts(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Bring gradients and moments into their parameter's memory layout before a step.

    The fused kernel walks all of them in memory order and never looks at strides: with channels_last weights and a
    contiguous gradient it updates the wrong elements without a word (torch 2.15).
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad = _laid_out_as(parameter, parameter.grad)
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                state[key] = _laid_out_as(parameter, value)


def _laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """`value` itself, or a copy with the strides of a parameter of the same shape; scalars are left alone."""
    if value.ndim == 0 or value.stride() == parameter.stride():
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device, requires_grad=False).copy_(value)


def learning_rate_at(
    images_seen: int,
    *,
    learning_rate: float,
    warmup_images: int,
    total_images: int,
    schedule: Literal["constant", "cosine"],
    final_learning_rate: float,
    progress: float | None = None,
) -> float:
    """The learning rate of the step after which `images_seen` images have been seen (so the first step's is not 0).

    Linear from 0 to `learning_rate` over `warmup_images`; then constant, or half a cosine that reaches
    `final_learning_rate` (a fraction of `learning_rate`) when the run is finished and stays there. `progress`: the
    finished share of the run in [0, 1] where something else than images ends it; by default images_seen / total_images.
    """
    if images_seen < warmup_images:
        return learning_rate * images_seen / warmup_images
    if schedule == "constant":
        return learning_rate
    done = images_seen / total_images if progress is None else progress
    start = min(warmup_images / total_images, 1.0)
    phase = 1.0 if start == 1.0 else min(max((done - start) / (1 - start), 0.0), 1.0)
    return learning_rate * (final_learning_rate + (1 - final_learning_rate) * 0.5 * (1 + math.cos(math.pi * phase)))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def nonfinite_terms(terms: Mapping[str, Tensor]) -> list[tuple[str, list[int]]]:
    """Which per-image loss terms are NaN or infinite: (name, indices in the batch) of each; [] where all is well.

    Waits once for the device in the usual case.
    """
    if not terms:
        return []
    if bool(torch.stack([term.isfinite().all() for term in terms.values()]).all()):
        return []
    bad = {name: (~term.isfinite()).nonzero().flatten().tolist() for name, term in terms.items()}
    return [(name, indices) for name, indices in bad.items() if indices]


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, named_parameters: NamedParameters
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state without pickle: tensors named `<state>/<parameter>` for safetensors, options for JSON.

    `named_parameters` must name every parameter that the optimizer holds; others are ignored.
    """
    names = {id(parameter): name for name, parameter in named_parameters}
    tensors: dict[str, Tensor] = {}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        group_names = [names[id(parameter)] for parameter in group["params"]]
        for name, parameter in zip(group_names, group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value.detach().contiguous()  # safetensors refuses other memory layouts
        groups.append({"parameters": group_names, "options": _options(group)})
    return tensors, {"optimizer": _kind(optimizer), "num_tensors": len(tensors), "groups": groups}


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    named_parameters: NamedParameters,
    tensors: Mapping[str, Tensor],
    options: Mapping[str, Any],
) -> None:
    """Put back what `optimizer_tensors` gave, bit for bit.

    Raises UserError where the optimizer, its parameters, their shapes or dtypes are not those that were saved.
    """
    names = {id(parameter): name for name, parameter in named_parameters}
    if options["optimizer"] != _kind(optimizer):
        raise UserError(f"the checkpoint was written by {options['optimizer']}, this run uses {_kind(optimizer)}")
    groups = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    saved = [list(group["parameters"]) for group in options["groups"]]
    if groups != saved:
        differing = sorted({n for g in groups for n in g} ^ {n for g in saved for n in g})
        raise UserError(
            "the optimizer state in the checkpoint belongs to other trainable parameters"
            + (f" (they differ in {_some(differing)})" if differing else " or another grouping of them")
            + ": resume with the model and the training.trainable it was started with"
        )
    if len(tensors) != options["num_tensors"]:
        raise UserError(
            f"the optimizer state in the checkpoint has {len(tensors)} tensors, {options['num_tensors']} were written: "
            "the files do not belong together; resume from another checkpoint"
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index_of = {names[id(parameter)]: index for index, parameter in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition("/")
        if name not in index_of:
            raise UserError(f"the optimizer state in the checkpoint has {full_name!r}: no such trainable parameter")
        parameter = parameters[index_of[name]]
        if tensor.ndim and (tensor.shape != parameter.shape or tensor.dtype != parameter.dtype):
            raise UserError(
                f"the optimizer state {full_name!r} is {tuple(tensor.shape)} {tensor.dtype}, the parameter "
                f"{tuple(parameter.shape)} {parameter.dtype}: resume with the same model and training.parameter_dtype"
            )
        # A copy, so that the optimizer never writes into the caller's tensors.
        value = _laid_out_as(parameter.detach(), tensor.clone())
        state.setdefault(index_of[name], {})[key] = value
    count = 0
    param_groups = []
    for group in options["groups"]:
        indices = list(range(count, count + len(group["parameters"])))
        count += len(indices)
        restored = {key: tuple(v) if isinstance(v, list) else v for key, v in group["options"].items()}
        param_groups.append({**restored, "params": indices})
    optimizer.load_state_dict({"state": state, "param_groups": param_groups})


def _kind(optimizer: torch.optim.Optimizer) -> str:
    return type(optimizer).__name__


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options as JSON holds them exactly: floats survive JSON's shortest notation, tuples become lists."""
    options: dict[str, Any] = {}
    for key, value in group.items():
        if key in ("params", "param_names"):
            continue
        if not (value is None or isinstance(value, bool | int | float | str | tuple)):
            raise TypeError(f"optimizer option {key} is a {type(value).__name__}, which JSON does not hold")
        options[key] = list(value) if isinstance(value, tuple) else value
    return options


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
