"""The exponential moving average of the weights, which is what a finished run ships."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from latentvae.losses.terms import widened


class ExponentialMovingAverage:
    """Averages a model's parameters with decay * (1 - exp(-t / warmup_steps)) at update t = 1, 2, ...

    The warm-up (DC-Gen) lets the average forget the first, bad weights; 0 is none. State is float32 or wider, on the
    model's device, so make it after the model was moved. Frozen parameters stay bit-identical to the model's. Buffers
    are not averaged: the autoencoder has none.
    """

    def __init__(self, model: nn.Module, decay: float, warmup_steps: float = 2000.0) -> None:
        """`model` is the plain module, not a wrapped one: its parameter names become those of the state."""
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; it must lie in [0, 1)")
        self.decay = decay
        self.warmup_steps = warmup_steps
        self.num_updates = 0
        self._parameters = dict(model.named_parameters())
        self._averages = {name: widened(p.detach()).clone() for name, p in self._parameters.items()}

    @property
    def current_decay(self) -> float:
        """The decay that the latest update used; 0 before the first."""
        warm = 1 - math.exp(-self.num_updates / self.warmup_steps) if self.warmup_steps > 0 else 1.0
        return self.decay * warm if self.num_updates else 0.0

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model's present weights: average += (1 - decay) (weights - average)."""
        self.num_updates += 1
        weights = [p.detach().to(self._averages[name].dtype) for name, p in self._parameters.items()]
        torch._foreach_lerp_(list(self._averages.values()), weights, 1 - self.current_decay)

    @torch.no_grad()
    def settle(self, modules: Iterable[nn.Module]) -> None:
        """Give the parameters of these parts of the model their averages, which then stay, where they are frozen."""
        own = {id(parameter) for module in modules for parameter in module.parameters()}
        for name, parameter in self._parameters.items():
            if id(parameter) in own:
                parameter.copy_(self._averages[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name: what a model folder holds. `num_updates` is to be saved beside it."""
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], num_updates: int) -> None:
        """Put back what `state_dict` gave; ValueError where names, shapes or dtypes differ."""
        differing = sorted(state.keys() ^ self._averages.keys())
        if differing:
            raise ValueError(f"the saved average has other parameters than the model: {differing[:3]}")
        for name, average in self._averages.items():
            if state[name].shape != average.shape or state[name].dtype != average.dtype:
                raise ValueError(
                    f"the saved average of {name} is {tuple(state[name].shape)} {state[name].dtype}, "
                    f"not {tuple(average.shape)} {average.dtype}"
                )
        for name, average in self._averages.items():
            average.copy_(state[name])
        self.num_updates = num_updates

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model's weights are the averages; afterwards what they were, bit for bit."""
        before = {name: p.detach().clone() for name, p in self._parameters.items()}
        try:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(self._averages[name])
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(before[name])
