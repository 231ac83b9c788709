"""Random choices of a reader, keyed by (seed, epoch, key): no order, worker or rank changes them."""

from collections.abc import Sequence

import numpy as np

from latentvae.keyed import key_hash

_STATE_BYTES = 24  # of an item's hash are the state of its generator; the byte after them decides its mirroring
_ANGLE = np.float32(np.pi * 2.0**-31)


def item_digests(keys: Sequence[str], seed: int, epoch: int) -> list[bytes]:
    """The hash from which all of an item's choices in an epoch are made (32 bytes each)."""
    return [key_hash("reading", seed, epoch, key) for key in keys]


def is_mirrored(digests: Sequence[bytes]) -> np.ndarray:
    """Whether to take the mirrored latents: (n,) bool, true for half of them."""
    return np.array([digest[_STATE_BYTES] & 1 for digest in digests], dtype=bool)


class KeyedNormals:
    """Standard normal float32 numbers, decided by each item's digest.

    SFC64 takes 192 bits of the digest as its state, and its bits become normals by Box and Muller 1958: vectorised, the
    two take a quarter of the time of `keyed_noise`. Magnitudes reach 6.6. NumPy's float32 functions may differ in the
    last bit between kinds of CPU, and so may these numbers.
    """

    def __init__(self) -> None:
        self._bits = np.random.SFC64(0)
        self._state = self._bits.state

    def fill(self, digests: Sequence[bytes], out: np.ndarray) -> None:
        """`out`: (n, size) float32, contiguous; one row per digest."""
        size = out.shape[1]
        half = (size + 1) // 2
        words = np.empty((len(digests), half), np.uint64)
        for digest, row in zip(digests, words, strict=True):
            self._state["state"]["state"][:3] = np.frombuffer(digest, "<u8", 3)
            self._state["state"]["state"][3] = 1  # SFC64's counter, as its author starts it
            self._bits.state = self._state
            row[:] = self._bits.random_raw(half)
        pairs = words.view(np.uint32)  # (n, 2 * half)
        first = (pairs[:, :half] >> np.uint32(1)).view(np.int32).astype(np.float32)  # 31 bits: signed converts faster
        radius = np.add(first, np.float32(0.5), out=first)
        radius *= np.float32(2.0**-31)  # (0, 1], and fine near 0, where the tail is
        np.log(radius, out=radius)
        radius *= np.float32(-2)
        np.sqrt(radius, out=radius)
        angle = pairs[:, half:].view(np.int32).astype(np.float32)
        angle *= _ANGLE  # [-pi, pi]
        np.multiply(np.cos(angle), radius, out=out[:, :half])
        rest = size - half
        np.multiply(np.sin(angle[:, :rest]), radius[:, :rest], out=out[:, half:])

    def __reduce__(self) -> tuple[type["KeyedNormals"], tuple[()]]:
        return KeyedNormals, ()  # it holds nothing that lasts


def key_words(keys: Sequence[str]) -> np.ndarray:
    """64 bits of each key's hash, (n,) uint64: what shuffling starts from."""
    first = np.fromiter((key_hash(key)[:8] for key in keys), dtype="S8", count=len(keys))
    return first.view("<u8").astype(np.uint64)


def shuffled(words: np.ndarray, *parts: object) -> np.ndarray:
    """An order of the items, (n,) int64, that depends on their key words and `parts` (seed, epoch, ...) alone."""
    offset = np.uint64(int.from_bytes(key_hash("shuffle", *parts)[:8], "little"))
    return np.argsort(_mixed(words ^ offset), kind="stable")


def _mixed(words: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014, with Stafford's constants): a bijection of 64 bits."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
