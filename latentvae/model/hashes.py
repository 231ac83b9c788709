"""Hashes that identify weights, whatever their order, their sharding or their device."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from latentvae.files import canonical_json


def weights_hash(architecture: Mapping[str, Any], state: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> str:
    """Hex sha256 of `architecture` (JSON-able) and, by sorted name, each chosen tensor's name, dtype, shape and values.

    The dtype counts: weights rounded to half precision give other outputs.

    Args:
        architecture: the config.json fields that change what these weights compute.
        state: a model's state dict.
        prefixes: a tensor is chosen where its name starts with one of them.
    """
    digest = hashlib.sha256(canonical_json(dict(architecture)))
    for name in sorted(key for key in state if key.startswith(prefixes)):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
