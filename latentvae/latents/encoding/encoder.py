"""Pixels to latents in the store's dtype, with the float32 rescue of what a reduced precision cannot hold."""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from latentvae.autoencoders.adapter import ImageAutoencoder
from latentvae.errors import UserError
from latentvae.images import PixelFormat, to_model
from latentvae.keyed import keyed_noise
from latentvae.latents.store.records import DTYPES, FLIPPED, TENSORS, StoreDtype, StoreKind
from latentvae.model.posterior import Posterior

logger = logging.getLogger("latentvae")

Precision = Literal["fp32", "bf16", "fp16"]
RESCUED = "not finite in {}, encoded again in float32"


@dataclass(frozen=True)
class EncodedBatch:
    """Latents of the rows that can be stored, in their order, and what happened to the others."""

    tensors: dict[str, Tensor]  # (n, D, h, w) on the CPU in the stored dtype, for the n rows without a problem
    problems: dict[int, str]  # row of the batch -> reason
    notes: dict[int, str]  # row of the batch -> what the index should say of it


@dataclass
class RunningBatch:
    """A batch that the device is working on."""

    pixels: Tensor  # (B, C, H, W) in [-1, 1], on the device
    keys: Sequence[str]
    moments: dict[str, Tensor]  # "" and, for the mirrored images, FLIPPED -> (B, 2D, h, w) float32 on the CPU
    done: torch.Event | None  # when `moments` may be read; None: at once


class LatentEncoder:
    """Encodes batches padded to a fixed size, so that a row's latents do not depend on how many others came with it.

    `start` hands a batch to the device and `finish` takes its result: with one batch between the two, a GPU does not
    wait for what the CPU does to the results. The weights are held in float32 and the precision is autocast's: the same
    module rescues in float32. A model in another dtype is copied.
    """

    def __init__(
        self,
        vae: ImageAutoencoder,
        pixels: PixelFormat,
        *,
        batch_size: int,
        batch_sizes: Mapping[str, int] | None = None,
        precision: Precision,
        store: StoreKind,
        dtype: StoreDtype,
        hflip: bool = False,
        seed: int,
        device: torch.device,
    ) -> None:
        """batch_size: images per forward; `batch_sizes` of single buckets, by the name WxH, win over it."""
        self.vae = vae.float().to(device)
        self.pixels, self.batch_size, self.precision = pixels, batch_size, precision
        self.store, self.dtype, self.hflip, self.seed, self.device = store, dtype, hflip, seed, device
        self._sizes = dict(batch_sizes or {})

    def one_by_one(self, precision: Precision) -> "LatentEncoder":
        """The same model for single images, with float32 moments as its result."""
        other = copy.copy(self)
        other.precision, other.store, other.dtype, other.hflip = precision, "moments", "fp32", False
        other.batch_size, other._sizes = 1, {}
        return other

    def size_of(self, bucket: str) -> int:
        """Images per forward in a bucket; smaller after memory ran out."""
        return self._sizes.get(bucket, self.batch_size)

    def __call__(self, images: Tensor, keys: Sequence[str]) -> EncodedBatch:
        """images (B, H, W, C) in the declared pixel format; `keys` for the sample's noise."""
        return self.finish(self.start(images, keys))

    def start(self, images: Tensor, keys: Sequence[str]) -> RunningBatch:
        """Hand images (B, H, W, C) in the declared pixel format to the device."""
        if self.device.type == "cuda":
            images = images.pin_memory()
        pixels = to_model(images.to(self.device, non_blocking=True), self.pixels)  # (B, C, H, W) in [-1, 1]
        views = {"": pixels} | ({FLIPPED: pixels.flip(-1)} if self.hflip else {})
        moments = {name: self._to_cpu(self._moments(view, self.precision)) for name, view in views.items()}
        done = None
        if self.device.type == "cuda":
            done = torch.Event(self.device)
            done.record()
        return RunningBatch(pixels, keys, moments, done)

    def finish(self, batch: RunningBatch) -> EncodedBatch:
        """Wait for a batch and make of its moments what is stored."""
        if batch.done is not None:
            batch.done.synchronize()
        problems: dict[int, str] = {}
        notes: dict[int, str] = {}
        tensors: dict[str, Tensor] = {}
        for view, moments in batch.moments.items():
            bad = _rows_not_finite(moments)
            if bad and self.precision != "fp32":
                pixels = batch.pixels[bad].flip(-1) if view else batch.pixels[bad]
                moments[bad] = self._moments(pixels, "fp32").cpu()
                notes |= {row: RESCUED.format(self.precision) for row in bad}
                bad = _rows_not_finite(moments)
            problems |= dict.fromkeys(bad, "the encoder's output is not finite, in float32 too")
            for name, values in self._values(moments, batch.keys, view).items():
                tensors[name + view] = stored = values.to(DTYPES[self.dtype])
                for row in _rows_not_finite(stored):
                    problems.setdefault(row, self._overflow(name, values[row]))
        keep = [row for row in range(len(batch.keys)) if row not in problems]
        return EncodedBatch({name: tensor[keep].contiguous() for name, tensor in tensors.items()}, problems, notes)

    def _values(self, moments: Tensor, keys: Sequence[str], view: str) -> dict[str, Tensor]:
        """moments (B, 2D, h, w) => what the store keeps of them, in float32."""
        if not self.vae.has_posterior:
            return {"mean": moments}
        posterior = Posterior(moments)
        if self.store == "sample":
            shape = posterior.mean.shape[1:]
            noise = torch.stack([keyed_noise(shape, self.seed, *([view] if view else []), key) for key in keys])
            return {"sample": posterior.mean + posterior.std * noise}
        values = {"mean": posterior.mean, "logvar": posterior.logvar}
        return {name: values[name] for name in TENSORS[self.store]}

    def _overflow(self, name: str, values: Tensor) -> str:
        return (
            f"its {name} reaches {values.abs().max().item():.6g}, more than {self.dtype} holds "
            f"({torch.finfo(DTYPES[self.dtype]).max:.6g}): store with --dtype bf16 or fp32"
        )

    def _to_cpu(self, moments: Tensor) -> Tensor:
        """float32 on the CPU; on CUDA by the time that the event after it is done."""
        if self.device.type != "cuda":
            return moments.cpu().contiguous()
        host = torch.empty(moments.shape, dtype=moments.dtype, pin_memory=True)
        return host.copy_(moments, non_blocking=True)

    def _moments(self, images: Tensor, precision: Precision) -> Tensor:
        """images [-1, 1] (B, C, H, W) => moments (B, 2D, h, w), float32 on the device.

        In forwards of the bucket's batch size; where the device's memory is too small for it, of half of that.
        """
        bucket = f"{images.shape[-1]}x{images.shape[-2]}"
        while True:
            size = self.size_of(bucket)
            try:
                parts = [self.forward(part, size, precision) for part in images.split(size)]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            except torch.OutOfMemoryError as error:
                if size == 1:
                    raise UserError(
                        f"the memory of {self.device} is too small for one image of {bucket}: encode at a lower "
                        "resolution or with --precision bf16"
                    ) from error
                self._sizes[bucket] = size // 2
            logger.warning(
                "%s: out of memory with %d images of %s; going on with %d", self.device, size, bucket, size // 2
            )
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def forward(self, images: Tensor, size: int, precision: Precision) -> Tensor:
        """images [-1, 1] (B, C, H, W) => moments (B, 2D, h, w) float32, all on the device; padded to `size` images."""
        rows = len(images)
        if rows < size:
            images = torch.cat([images, images[-1:].expand(size - rows, -1, -1, -1)])
        with torch.no_grad(), reproducible_float32(), ExitStack() as stack:
            if precision != "fp32":
                stack.enter_context(torch.autocast(self.device.type, DTYPES[precision]))
            return self.vae.moments(images.contiguous(memory_format=torch.channels_last))[:rows].float()


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
