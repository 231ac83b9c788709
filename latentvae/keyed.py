"""Choices and noise that follow from keys and numbers alone: no random state to save, none to get out of step."""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from latentvae.errors import UserError


def key_hash(*parts: object) -> bytes:
    """The sha256 of keys and numbers, from which every keyed choice is made (32 bytes)."""
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogateescape")).digest()


def split_by_key(keys: Sequence[str], fraction: float) -> tuple[list[int], list[int]]:
    """Indices (to train on, held out): about `fraction` of the keys are held out, each by its own hash.

    No key changes sides when others come or go.
    """
    if not 0.0 <= fraction < 1.0:
        raise UserError(f"the held-out fraction is {fraction}: it must be at least 0 and below 1")
    train: list[int] = []
    held_out: list[int] = []
    for index, key in enumerate(keys):
        position = int.from_bytes(key_hash("split", key)[:8], "big") / 2**64  # uniform in [0, 1)
        (held_out if position < fraction else train).append(index)
    return train, held_out


def uniforms(*parts: object) -> tuple[float, float, float, float]:
    """Four independent numbers in [0, 1) that depend on `parts` alone: the bits of their sha256."""
    words = np.frombuffer(key_hash(*parts), dtype=">u8") >> np.uint64(11)  # 53 bits, all that a double holds
    first, second, third, fourth = (words * 2.0**-53).tolist()
    return first, second, third, fourth


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of `count` images in one epoch, (count,) int64: raw Philox words sorted, the same in every NumPy."""
    key = int.from_bytes(key_hash("order", seed, epoch)[:16], "big")
    words = np.random.Philox(key=key).random_raw(count)
    return np.argsort(words, kind="stable")


def keyed_noise(shape: Sequence[int], *key: str | int) -> Tensor:
    """Standard normal float32 of `shape` on the CPU, decided by `key` alone, such as (seed, epoch, image key).

    So world size, micro-batches, workers, devices and resumes change nothing. Philox is a counter-based generator
    (Salmon et al. 2011) that takes 128 bits of the key's sha256; torch's CPU generator would take 32, and among 65,000
    images two could be expected to share their noise.
    """
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key_hash(*key)[:16], "little")))
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))
