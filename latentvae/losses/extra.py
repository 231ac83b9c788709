"""Loss terms of the user's own: `loss.extra`."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentvae.errors import UserError, one_line
from latentvae.imported import import_object
from latentvae.losses.config import ExtraTerm
from latentvae.losses.terms import widened

TERMS = frozenset({"reconstruction", "ssim", "perceptual", "kl", "anchor", "adversarial", "logvar", "discriminator"})


@dataclass(frozen=True)
class LoadedTerm:
    """A term ready to be called.

    `name`: of its class, as it is logged; the second of a class is Class#2. `weight`: of its mean over the batch.
    `compute`: the user's object.
    """

    name: str
    weight: float
    compute: Callable[[Tensor, Tensor, Tensor], Tensor]

    def __call__(self, images: Tensor, reconstructions: Tensor, moments: Tensor) -> Tensor:
        """images and reconstructions (B, C, H, W), moments (B, 2c, h, w), float32 or wider => (B,).

        In a step of `loss.equivariance` images and reconstructions are shrunk and turned; moments are not.
        Raises UserError where the object gives anything else, or a value without a gradient: it would train nothing.
        """
        value: Any = self.compute(images, reconstructions, moments)
        wanted = f"it must be a floating point tensor ({len(images)},), one value per image"
        if not isinstance(value, Tensor):
            raise UserError(f"loss.extra: {self.name} gave a {type(value).__name__}; {wanted}")
        if value.shape != (len(images),) or not value.is_floating_point():
            raise UserError(f"loss.extra: {self.name} gave a {value.dtype} tensor {tuple(value.shape)}; {wanted}")
        if reconstructions.requires_grad and moments.requires_grad and not value.requires_grad:
            raise UserError(
                f"loss.extra: {self.name} gave a value without a gradient, which trains nothing: compute it from "
                "reconstructions or moments, without no_grad or detach"
            )
        return widened(value)


def load_terms(terms: Sequence[ExtraTerm], device: torch.device | str = "cpu") -> tuple[LoadedTerm, ...]:
    """Import and make every term; a module is moved to `device`, put in eval mode and frozen.

    All processes make the same one: random weights come from a fixed seed, and the caller's generator is left alone.

    Raises:
        UserError: a term cannot be imported, does not take its arguments, cannot be called, or has the name of ours.
    """
    loaded: list[LoadedTerm] = []
    for term in terms:
        factory = _factory(term.term)
        name = getattr(factory, "__name__", term.term.rpartition(":")[2])
        if name in TERMS:
            raise UserError(f"loss.extra: {term.term} would be logged as {name}, a term of ours: rename the class")
        _check_arguments(factory, term)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = factory(**term.arguments)
        if not callable(made):
            raise UserError(
                f"loss.extra: {term.term} made a {type(made).__name__}, which cannot be called with images, "
                "reconstructions and moments: give it __call__, or forward where it is an nn.Module"
            )
        if isinstance(made, nn.Module):
            made = made.to(device).eval().requires_grad_(False)
        earlier = sum(other.name.partition("#")[0] == name for other in loaded)
        loaded.append(LoadedTerm(f"{name}#{earlier + 1}" if earlier else name, term.weight, made))
    return tuple(loaded)


def _factory(specification: str) -> Callable[..., Any]:
    """The class that "python:module:Class" names."""
    factory: Any = import_object(specification, field="loss.extra", what="Class")
    if not callable(factory):
        raise UserError(f"loss.extra: {specification} is a {type(factory).__name__}; a class is needed")
    return factory


def _check_arguments(factory: Callable[..., Any], term: ExtraTerm) -> None:
    try:
        signature = inspect.signature(factory)
    except ValueError:  # some classes written in C have none
        return
    try:
        signature.bind(**term.arguments)
    except TypeError as error:
        raise UserError(f"loss.extra: {term.term} takes {signature}; arguments: {one_line(error)}") from error
