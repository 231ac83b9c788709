"""The latents of a store as other trainers take them: one array per image, of the mean, a sample, or both moments."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from latentvae.errors import UserError
from latentvae.keyed import keyed_noise
from latentvae.latents.operating.parts import StoredPart, stored_parts
from latentvae.latents.reading.readable import ReadableStore
from latentvae.latents.store.records import FLIPPED, IndexRow

Posterior = Literal["mode", "sample", "moments"]
HandedDtype = Literal["fp16", "fp32"]  # what NumPy can hold
NUMPY: dict[HandedDtype, torch.dtype] = {"fp16": torch.float16, "fp32": torch.float32}
TOGETHER = 64  # images that are computed at once


@dataclass(frozen=True)
class HandedImage:
    """One image's latents, (D, h, w), or (2D, h, w) of both moments; normalized ones may be patchified (FLUX.2)."""

    row: IndexRow
    latents: np.ndarray
    mirrored: np.ndarray | None  # of the mirrored image, where the store has it


@dataclass(frozen=True)
class Handing:
    """What is made of the stored numbers."""

    store: ReadableStore
    posterior: Posterior
    normalize: bool
    dtype: HandedDtype
    seed: int

    @classmethod
    def resolved(
        cls,
        store: ReadableStore,
        posterior: Posterior | None,
        normalize: bool,
        dtype: HandedDtype | None,
        seed: int,
    ) -> "Handing":
        """With the store's own kind and type where nothing is said; UserError for what it does not hold."""
        manifest = store.manifest
        there: dict[str, tuple[Posterior, ...]] = {
            "moments": ("mode", "sample", "moments"),
            "mean": ("mode",),
            "sample": ("sample",),
        }
        allowed = there[manifest.store]
        if posterior is not None and posterior not in allowed:
            raise UserError(
                f"posterior is {posterior}; {store.name} holds the {manifest.store} of each image: "
                f"choose {' or '.join(allowed)}"
            )
        if dtype is not None and dtype not in NUMPY:
            raise UserError(f"dtype is {dtype}; it must be one of {', '.join(NUMPY)}")
        chosen = posterior or allowed[0]
        if normalize and chosen == "moments":
            raise UserError("moments are handed over raw: choose --posterior mode or sample to normalize")
        return cls(store, chosen, normalize, dtype or ("fp16" if manifest.dtype == "fp16" else "fp32"), seed)

    @property
    def has_mirrored(self) -> bool:
        """Whether the store has mirrored images."""
        return self.store.manifest.hflip

    def images(self, bucket: str) -> Iterator[HandedImage]:
        """Every image of a bucket, in the order of the store."""
        for part in stored_parts(self.store, bucket):
            for start in range(0, len(part.rows), TOGETHER):
                chunk = slice(start, start + TOGETHER)
                latents = self._values(part, chunk, "")
                mirrored = self._values(part, chunk, FLIPPED) if self.has_mirrored else None
                for index, row in enumerate(part.rows[chunk]):
                    yield HandedImage(row, latents[index], None if mirrored is None else mirrored[index])

    def _values(self, part: StoredPart, chunk: slice, view: str) -> np.ndarray:
        names = [name for name in self.store.manifest.tensors if not name.endswith(FLIPPED)]
        stored = {name: part.tensors[name + view][chunk].float() for name in names}
        if self.posterior == "moments":
            values = torch.cat([stored["mean"], stored["logvar"]], dim=1)
        elif self.posterior == "sample":
            values = stored["sample"] if "sample" in stored else self._sampled(part, chunk, stored, view)
        else:
            values = stored["mean"]
        if self.normalize:
            values = self.store.scaling.normalize(values)
        given = values.to(NUMPY[self.dtype])
        if not torch.isfinite(given).all():
            raise UserError(
                f"latents of {part.name} reach {values.abs().max().item():.6g}, more than "
                f"{self.dtype} holds: pass --dtype fp32"
            )
        array: np.ndarray = given.numpy()
        return array

    def _sampled(self, part: StoredPart, chunk: slice, stored: dict[str, Tensor], view: str) -> Tensor:
        """The same noise as `encode --store sample` takes with that seed."""
        mean = stored["mean"]
        keys = [row.key for row in part.rows[chunk]]
        noise = [keyed_noise(mean.shape[1:], self.seed, *([view] if view else []), key) for key in keys]
        return mean + torch.exp(0.5 * stored["logvar"]) * torch.stack(noise)


def little_endian(array: np.ndarray) -> np.ndarray:
    """In C order, as every reader takes it."""
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))


def npy_bytes(array: np.ndarray) -> bytes:
    """A `.npy` file, without pickle."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, little_endian(array), allow_pickle=False)
    return buffer.getvalue()
