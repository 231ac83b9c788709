"""Pixels to latents in the store's dtype, with the float32 rescue of what a reduced precision cannot hold."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from latentvae.images import PixelFormat, to_model
from latentvae.keyed import keyed_noise
from latentvae.latents.records import DTYPES, TENSORS, StoreDtype, StoreKind
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.model.posterior import Posterior

Precision = Literal["fp32", "bf16", "fp16"]
RESCUED = "not finite in {}, encoded again in float32"


@dataclass(frozen=True)
class EncodedBatch:
    """Latents of the rows that can be stored, in their order, and what happened to the others."""

    tensors: dict[str, Tensor]  # (n, D, h, w) on the CPU in the stored dtype, for the n rows without a problem
    problems: dict[int, str]  # row of the batch -> reason
    notes: dict[int, str]  # row of the batch -> what the index should say of it


class LatentEncoder:
    """Encodes batches of exactly `batch_size` (shorter ones are padded), so that a row's latents do not depend on
    how many others came with it.

    The weights are held in float32 and the precision is autocast's: the same module rescues in float32. A model in
    another dtype is copied.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        pixels: PixelFormat,
        *,
        batch_size: int,
        precision: Precision,
        store: StoreKind,
        dtype: StoreDtype,
        seed: int,
        device: torch.device,
    ) -> None:
        if any(parameter.dtype != torch.float32 for parameter in vae.parameters()):
            vae = copy.deepcopy(vae).float()
        self.vae = vae.to(device)
        self.pixels, self.batch_size, self.precision = pixels, batch_size, precision
        self.store, self.dtype, self.seed, self.device = store, dtype, seed, device

    def __call__(self, images: Tensor, keys: Sequence[str]) -> EncodedBatch:
        """images (B, H, W, C) in the declared pixel format, B <= batch_size; `keys` for the sample's noise."""
        problems: dict[int, str] = {}
        notes: dict[int, str] = {}
        pixels = to_model(images.to(self.device), self.pixels)  # (B, C, H, W) in [-1, 1]
        moments = self._moments(pixels, self.precision)  # (B, 2D, h, w) float32
        bad = _rows_not_finite(moments)
        if bad and self.precision != "fp32":
            moments[bad] = self._moments(pixels[bad], "fp32")
            notes = {row: RESCUED.format(self.precision) for row in bad}
            bad = _rows_not_finite(moments)
        for row in bad:
            problems[row] = "the encoder's output is not finite, in float32 too"

        posterior = Posterior(moments)
        values = {"mean": posterior.mean, "logvar": posterior.logvar}
        if self.store == "sample":
            noise = torch.stack([keyed_noise(posterior.mean.shape[1:], self.seed, key) for key in keys])
            values = {"sample": posterior.mean + posterior.std * noise}
        tensors = {name: values[name].to(DTYPES[self.dtype]) for name in TENSORS[self.store]}
        for name, tensor in tensors.items():
            for row in _rows_not_finite(tensor):
                largest = values[name][row].abs().max().item()
                problems.setdefault(
                    row,
                    f"its {name} reaches {largest:.6g}, more than {self.dtype} holds "
                    f"({torch.finfo(DTYPES[self.dtype]).max:.6g}): store with --dtype bf16 or fp32",
                )
        keep = [row for row in range(len(images)) if row not in problems]
        return EncodedBatch({name: tensor[keep].contiguous() for name, tensor in tensors.items()}, problems, notes)

    def _moments(self, images: Tensor, precision: Precision) -> Tensor:
        """images [-1, 1] (B, C, H, W) => moments (B, 2D, h, w), float32 on the CPU."""
        rows = len(images)
        if rows < self.batch_size:
            images = torch.cat([images, images[-1:].expand(self.batch_size - rows, -1, -1, -1)])
        with torch.no_grad(), reproducible_float32(), ExitStack() as stack:
            if precision != "fp32":
                stack.enter_context(torch.autocast(self.device.type, DTYPES[precision]))
            moments = self.vae.moments(images.contiguous(memory_format=torch.channels_last))
            return moments[:rows].float().cpu().contiguous()


def _rows_not_finite(tensor: Tensor) -> list[int]:
    finite = torch.isfinite(tensor).flatten(1).all(1)
    return torch.nonzero(~finite).flatten().tolist()


@contextmanager
def reproducible_float32() -> Iterator[None]:
    """float32 is float32 (no TF32, which is cuDNN's default) and the same algorithm is chosen each time."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
