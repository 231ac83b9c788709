"""What a few images of a source tell before the whole of it is encoded: what to keep, and how many at a time."""

import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from torch import Tensor

from latentvae.data.entries import EntryTable
from latentvae.data.workers import WorkerDied, load_batches
from latentvae.errors import UserError, one_line
from latentvae.images import PixelFormat, to_model
from latentvae.latents.encoding.encoder import LatentEncoder, Precision
from latentvae.latents.encoding.preprocess import Piece, UnitImages
from latentvae.latents.encoding.unit import UnitLatents, WaitingBatch
from latentvae.latents.store.plan import PlannedImage, hash_order
from latentvae.latents.store.records import DTYPES, MIXED, TENSORS, Bucket, StoreDtype, StoreKind, row_bytes

logger = logging.getLogger("latentvae")

SAMPLE = 256  # images that are encoded to choose the kind of store
ENOUGH = 16  # of them, when MAX_SECONDS are over
MAX_SECONDS = 60.0
READ_TOGETHER = 4  # images
CANDIDATES = 65_536  # entries, evenly spaced, from which a sample is drawn: a key costs a hash
ELEMENTS = 16_384  # of an image's latents, from which medians are taken
MAX_BATCH = 256  # images
GAIN = 1.05  # of images/s, for which a batch is doubled
REPEATS, MIN_SECONDS = 3, 0.3  # of each forward that is timed, after one that is not: the fastest counts
LONG_SECONDS = 5.0  # a forward so long is timed once
SIMILAR = 1.1  # ratio of pixels up to which buckets share one measurement


@dataclass(frozen=True)
class Calibration:
    """What the encoder made of a few images."""

    num_images: int  # encoded
    num_sampled: int  # read or to be read: some of them were not readable, or time was up
    seconds: float
    dtype: StoreDtype
    precision: Precision
    posterior_std: float | None  # median over elements of the raw latents; None where the model has no posterior
    rounding_error: float | None  # RMS that storing as `dtype` gives to the mean, median over elements
    std_over_rounding: float | None  # median over elements of the ratio of the two
    deviation: float | None  # RMS of the mean's difference from float32's over the RMS of the mean; None: is float32
    num_rescued: int  # not finite in `precision`
    problem: str | None  # of the first image that could not be encoded
    latent_bytes: dict[StoreKind, float]  # of an image, by what is kept, in `dtype`
    sizes: np.ndarray  # (N, 2) width and height in pixels of the images read; -1 where one could not be

    @property
    def kind(self) -> StoreKind:
        """`mean` where a sample could not be told from the mean, once stored; else `moments`.

        UserError where nothing could be measured.
        """
        if not self.num_images:
            raise UserError(
                f"--store auto: none of {self.num_sampled} images could be encoded ({self.problem}): mend that, or "
                "pass --store moments or mean"
            )
        return "moments" if self.std_over_rounding is not None and self.std_over_rounding >= 1 else "mean"

    def lines(self) -> list[str]:
        """For people, without the sizes."""
        if not self.num_images:
            return [f"none of {self.num_sampled} images could be encoded; the first: {self.problem}"]
        many = "" if self.num_images == self.num_sampled else f" of {self.num_sampled}"
        lines = [f"measured on {self.num_images}{many} images, in {self.seconds:.1f} s"]
        if self.posterior_std is not None:
            lines.append(
                f"posterior std {self.posterior_std:.3g}, {self.dtype} rounds by {self.rounding_error:.3g} RMS: ratio "
                f"{self.std_over_rounding:.3g} (medians); --store auto keeps {self.kind}"
            )
        if self.deviation is not None:
            rescued = f", {self.num_rescued} images not finite and encoded again" if self.num_rescued else ""
            lines.append(f"{self.precision} differs from fp32 by {self.deviation:.2g} of the latents' RMS{rescued}")
        return lines


def measured_kind(images: UnitImages, encoder: LatentEncoder, num_workers: int) -> StoreKind:
    """`mean` where the posterior's deviation is below the rounding of what is stored, else `moments`.

    Encodes up to 256 images. UserError where none of them can be encoded.
    """
    found = calibrate(images, encoder, num_workers)
    kind = found.kind
    sizes = ", ".join(f"{choice} {size / 1024:.1f} KiB" for choice, size in found.latent_bytes.items())
    for line in (*found.lines(), f"an image takes, by --store: {sizes} ({found.dtype})"):
        logger.info("--store auto: %s", line)
    return kind


def calibrate(images: UnitImages, encoder: LatentEncoder, num_workers: int, count: int = SAMPLE) -> Calibration:
    """Encode up to `count` images spread over the source, as `encoder` does and in float32.

    One by one, for in many buckets most batches would be padding. Ends after a minute where 16 are done by then.
    """
    began = time.monotonic()
    sample = sampled(images.source.entries(), count)
    chosen, exact = encoder.one_by_one(encoder.precision), encoder.one_by_one("fp32")
    std: list[Tensor] = []
    rounding: list[Tensor] = []
    squared_error = squares = 0.0
    problems: list[str] = []
    done = rescued = 0
    kept = dict.fromkeys(TENSORS if encoder.vae.has_posterior else ("mean",), 0)
    unit = UnitLatents(len(sample), chosen.size_of)
    for batch in _batches(images, sample, unit, num_workers):
        if done >= ENOUGH and time.monotonic() - began > MAX_SECONDS:
            break
        encoded = chosen(batch.pixels(), batch.keys)
        problems += encoded.problems.values()
        if len(encoded.problems) == len(batch.keys):
            continue
        done += len(batch.keys) - len(encoded.problems)
        rescued += len(encoded.notes)
        mean = encoded.tensors["mean"]
        for kind in kept:
            kept[kind] += len(mean) * _bytes_of(encoder, batch.bucket, kind)
        part = _part(mean)
        rounding.append(rounding_rms(part, encoder.dtype))
        if "logvar" in encoded.tensors:
            std.append(torch.exp(0.5 * _part(encoded.tensors["logvar"])))
        if encoder.precision != "fp32":
            reference = exact(batch.pixels(), batch.keys).tensors["mean"].double()  # rescued there, or not even here
            squared_error += (mean - reference).square().sum().item()
            squares += reference.square().sum().item()
    return Calibration(
        num_images=done,
        num_sampled=len(sample),
        seconds=time.monotonic() - began,
        dtype=encoder.dtype,
        precision=encoder.precision,
        posterior_std=_median(std),
        rounding_error=_median(rounding),
        std_over_rounding=_median([one / other for one, other in zip(std, rounding, strict=True)] if std else []),
        deviation=math.sqrt(squared_error / squares) if squares else None,
        num_rescued=rescued,
        problem=next((row.error for row in unit.rows if row.error is not None), next(iter(problems), None)),
        latent_bytes={kind: total / max(done, 1) for kind, total in kept.items()},
        sizes=np.array([(row.width or -1, row.height or -1) for row in unit.rows], np.int64).reshape(-1, 2),
    )


def sampled(entries: EntryTable, count: int) -> EntryTable:
    """`count` entries in the order of their keys' hashes: for an equal source always the same, spread over it."""
    candidates = entries[:: max(1, math.ceil(len(entries) / CANDIDATES))]
    return EntryTable(candidates.table.take(hash_order(candidates)[:count]))


def rounding_rms(values: Tensor, dtype: StoreDtype) -> Tensor:
    """RMS error of rounding to `dtype` at each value: the distance of its neighbours there, over the root of 12."""
    info = torch.finfo(DTYPES[dtype])
    _, exponent = torch.frexp(values)  # |value| = m 2^e, m in [0.5, 1)
    spacing = torch.ldexp(torch.full_like(values, info.eps / 2), exponent)
    least = info.tiny * info.eps  # of the subnormal numbers
    return spacing.clamp_min(least).where(values != 0, torch.tensor(least)) / math.sqrt(12)


def _batches(images: UnitImages, sample: EntryTable, unit: UnitLatents, num_workers: int) -> Iterator[WaitingBatch]:
    """What can be encoded, as it comes in."""
    planned = [
        PlannedImage(0, row, entry.key, entry.uri, entry.offset, None, None, MIXED, entry.num_bytes, entry.mtime_ns)
        for row, entry in enumerate(sample)
    ]
    pieces = (planned[start : start + READ_TOGETHER] for start in range(0, len(planned), READ_TOGETHER))
    try:
        for piece in load_batches(images, pieces, Piece.of, min(num_workers, 4), prefetch=2):
            yield from unit.add(piece)
    except WorkerDied as error:
        logger.warning("%s; what is measured comes from the images before it", one_line(error))
    yield from unit.rest()


def _bytes_of(encoder: LatentEncoder, bucket: str, kind: StoreKind) -> int:
    width, height = (int(side) // encoder.vae.downsample_factor for side in bucket.split("x"))
    size = Bucket(width=0, height=0, latent_width=width, latent_height=height)
    return row_bytes(size, encoder.vae.latent_channels, kind, encoder.dtype, encoder.hflip)


def _part(values: Tensor) -> Tensor:
    """Some elements of each row (N, ...), the same of every tensor of that shape: (N, at most ELEMENTS)."""
    flat = values.flatten(1)
    if flat.shape[1] <= ELEMENTS:
        return flat
    return flat[:, torch.randint(flat.shape[1], (ELEMENTS,), generator=torch.Generator().manual_seed(0))]


def _median(parts: Sequence[Tensor]) -> float | None:
    return float(np.median(np.concatenate([part.numpy().ravel() for part in parts]))) if parts else None


# --- batch sizes -----------------------------------------------------------------------------------------------------


def measured_batch_sizes(
    encoder: LatentEncoder, buckets: Sequence[Bucket], limits: Mapping[str, int]
) -> dict[str, int]:
    """Images per forward for each bucket named in `limits`, not above its limit.

    Doubled from 1 while images/s grow by 5 percent and the device's memory holds. Buckets of about equal area (within
    10 percent) share the measurement of the largest one.
    """
    wanted = [bucket for bucket in buckets if bucket.name in limits]
    sizes: dict[str, int] = {}
    largest: Bucket | None = None
    best = 1
    for bucket in sorted(wanted, key=lambda bucket: (-bucket.width * bucket.height, bucket.name)):
        if largest is None or largest.width * largest.height > SIMILAR * bucket.width * bucket.height:
            largest, most = bucket, max(limits[other.name] for other in wanted)
            best = _best_size(encoder, bucket, min(most, MAX_BATCH))
        sizes[bucket.name] = min(best, limits[bucket.name])
    return sizes


def _best_size(encoder: LatentEncoder, bucket: Bucket, limit: int) -> int:
    best, rate, size = 1, 0.0, 1
    room = psutil.virtual_memory().available if encoder.device.type == "cpu" else sys.maxsize
    before = psutil.Process().memory_info().rss
    tried = []
    while size <= limit:
        try:
            reached = size / forward_seconds(encoder, bucket, size)
        except torch.OutOfMemoryError:
            tried.append(f"{size}: out of memory")
            if encoder.device.type == "cuda":
                torch.cuda.empty_cache()
            break
        tried.append(f"{size}: {reached:.3g}/s")
        if reached < GAIN * rate:
            break
        best, rate = size, reached
        size *= 2
        if 2 * (_peak_memory() - before) > room:  # the system would not refuse it, but end the process
            break
    logger.info("--batch-size auto: %s: %d (images/s by batch size: %s)", bucket.name, best, ", ".join(tried))
    return best


def forward_seconds(encoder: LatentEncoder, bucket: Bucket, size: int) -> float:
    """Of one forward of `size` images of a bucket, the fastest of several. torch.OutOfMemoryError comes through."""
    images = to_model(noise_images(encoder.pixels, bucket, size).to(encoder.device), encoder.pixels)

    def seconds() -> float:
        began = time.perf_counter()
        encoder.forward(images, size, encoder.precision)[0].cpu()  # copied: the device has finished
        return time.perf_counter() - began

    first = seconds()  # it also chooses kernels
    if first > LONG_SECONDS:
        return first
    repeats = min(10 * REPEATS, max(REPEATS, math.ceil(MIN_SECONDS / first)))
    return min(seconds() for _ in range(repeats))


def noise_images(pixels: PixelFormat, bucket: Bucket, size: int) -> Tensor:
    """One image of noise, (size, H, W, C) of the declared format: it takes an encoder as long as pictures do."""
    values = np.random.default_rng(0).uniform(pixels.low, pixels.high, (bucket.height, bucket.width, pixels.channels))
    return torch.from_numpy(np.broadcast_to(values.astype(pixels.numpy_dtype), (size, *values.shape)).copy())


def _peak_memory() -> int:
    """Most bytes of main memory that this process has held so far."""
    on_windows = getattr(psutil.Process().memory_info(), "peak_wset", None)
    if on_windows is not None:
        return int(on_windows)
    import resource  # absent there

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
