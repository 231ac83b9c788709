"""Which parameters of an autoencoder train."""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Literal

from latentvae.errors import UserError
from latentvae.model.autoencoder import AutoencoderKL

_ENCODER = ("encoder.", "quant_conv.")  # what makes latents


def select_trainable(vae: AutoencoderKL, trainable: Literal["all", "decoder"] | Sequence[str]) -> list[str]:
    """Set `requires_grad` of every parameter, and return the names of those that train, in the model's order.

    Args:
        vae: without an adapter; with one, `add_lora` has decided.
        trainable: "all"; "decoder", which freezes encoder and quant_conv, so that latents stay as they are; or regular
            expressions, of which one must match a parameter's whole name.

    Raises:
        UserError: a regular expression that is none, or that matches no parameter.
    """
    names = [name for name, _ in vae.named_parameters()]
    if trainable == "all":
        chosen = set(names)
    elif trainable == "decoder":
        chosen = {name for name in names if not name.startswith(_ENCODER)}
    elif isinstance(trainable, str):
        raise UserError(f"training.trainable is {trainable!r}: give all, decoder or a list of regular expressions")
    else:
        chosen = matching(trainable, names, field="training.trainable", what="parameter")
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_(name in chosen)
    return [name for name in names if name in chosen]


def matching(patterns: Sequence[str], names: Iterable[str], *, field: str, what: str) -> set[str]:
    """The names that one of the regular expressions matches as a whole.

    Args:
        field, what: the recipe's field and what its names are of, for messages.

    Raises:
        UserError: no expression at all, one that is not valid, or one that matches no name, with the nearest names.
    """
    names = list(names)
    if not patterns:
        raise UserError(f"{field} is an empty list: give at least one regular expression")
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            found = [name for name in names if re.fullmatch(pattern, name)]
        except re.error as error:
            raise UserError(f"{field} has {pattern!r}, which is not a regular expression: {error}") from error
        if not found:
            raise UserError(
                f"{field} has {pattern!r}, which matches the whole name of no {what}; near names: "
                f"{', '.join(_near(pattern, names))}"
            )
        chosen.update(found)
    return chosen


def _near(pattern: str, names: Sequence[str]) -> list[str]:
    """Up to three names that are most alike, those that the expression matches in part before all others."""
    partly = [name for name in names if re.search(pattern, name)]
    plain = re.sub(r"[\\^$*+?()\[\]|{}]", "", pattern)
    return difflib.get_close_matches(plain, partly or names, n=3, cutoff=0.0)
