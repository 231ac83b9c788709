"""Which image and which term was not finite, in words."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from latentvae.data.pipeline import Batch
from latentvae.errors import UserError
from latentvae.training.optim import nonfinite_terms

SHOWN_KEYS = 5


class NonFiniteLoss(UserError):
    """A loss term or a gradient was NaN or infinite; nothing was updated."""


def is_any_nonfinite(collected: Sequence[Mapping[str, Tensor]], norms: Mapping[str, Tensor]) -> Tensor:
    """() bool: whether a term of any micro-batch or a gradient norm is not finite. Nothing waits for the device."""
    values = [value for terms in collected for value in terms.values()] + list(norms.values())
    return torch.stack([(~torch.isfinite(value)).any() for value in values]).any()


def describe_nonfinite(
    collected: Sequence[Mapping[str, Tensor]], norms: Mapping[str, Tensor], batches: Sequence[Batch]
) -> list[str]:
    """`<term> of <keys of the images>` and `the gradient of the <network>` for all that is not finite here."""
    found = []
    for terms, batch in zip(collected, batches, strict=True):
        for name, indices in nonfinite_terms(terms):
            is_per_image = len(terms[name]) == len(batch.keys)  # else one figure for all of them
            keys = [batch.keys[index] for index in indices] if is_per_image else batch.keys
            more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
            found.append(f"{name} of {', '.join(keys[:SHOWN_KEYS])}{more}")
    return found + [f"the gradient of the {name}" for name, norm in norms.items() if not torch.isfinite(norm)]
