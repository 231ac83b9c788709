"""Normal noise that belongs to an image, not to a place in a stream."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def keyed_noise(shape: Sequence[int], *key: str | int) -> Tensor:
    """Standard normal float32 of `shape` on the CPU, decided by `key` alone, such as (seed, epoch, image key).

    So world size, micro-batches, workers, devices and resumes change nothing. Philox is a counter-based generator
    (Salmon et al. 2011) that takes 128 bits of the key's sha256; torch's CPU generator would take 32, and among 65,000
    images two could be expected to share their noise.
    """
    digest = hashlib.sha256("\0".join(map(str, key)).encode("utf-8", "surrogateescape")).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))
