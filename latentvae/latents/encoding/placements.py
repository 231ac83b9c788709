"""What the sizes of images mean for an encoding: their buckets, and how much is cropped, enlarged or left out."""

from dataclasses import dataclass

import numpy as np

from latentvae.data.entries import EntryTable
from latentvae.images import DecodePolicy
from latentvae.latents.encoding.growth import probe_sizes
from latentvae.latents.encoding.measure import sampled
from latentvae.latents.store.buckets import BucketRule

PROBED = 2_000  # files of a folder whose headers are read where its plan does not need them


@dataclass(frozen=True)
class SizeSample:
    """Sizes of some images of a source, or of all."""

    sizes: np.ndarray  # (N, 2) width and height in pixels; -1 where the image could not be read
    is_whole: bool

    @property
    def unreadable(self) -> float:
        """Share of the images."""
        return float((self.sizes[:, 0] < 0).mean()) if len(self.sizes) else 0.0


@dataclass(frozen=True)
class Placements:
    """Where the images of a sample go, in shares of all that were looked at."""

    buckets: dict[str, float]  # name -> share, the largest first; with skipped and unreadable they add up to 1
    skipped: float  # too small
    unreadable: float
    upscaled: float
    kept_small: float  # at less than the size of their bucket
    cropped: float  # of which anything is cut off
    area_lost: float  # by the crop, mean over the images in buckets
    positions: float  # of latents along both axes, mean over the images in buckets

    @property
    def encoded(self) -> float:
        """Share of the images that get latents."""
        return sum(self.buckets.values())


def probed(entries: EntryTable, policy: DecodePolicy) -> SizeSample | None:
    """Of up to 2,000 files by the hash of their keys; None where the images are not files of this machine."""
    sample = sampled(entries, PROBED)
    if any(entry.offset is not None or entry.num_bytes is None or "://" in entry.uri for entry in sample):
        return None
    return SizeSample(probe_sizes(sample, policy), len(sample) == len(entries))


def placed(sample: SizeSample, rule: BucketRule) -> Placements:
    """Apply the rule to every size."""
    total = max(len(sample.sizes), 1)
    known = sample.sizes[sample.sizes[:, 0] > 0]
    sizes, counts = np.unique(known, axis=0, return_counts=True)
    names = {bucket.name for bucket in rule.buckets}
    buckets: dict[str, float] = {}
    skipped = upscaled = kept = cropped = lost = positions = 0.0
    for (width, height), count in zip(sizes.tolist(), counts.tolist(), strict=True):
        place = rule.place(width, height)
        if isinstance(place, str):
            skipped += count
            continue
        bucket = place.bucket
        buckets[bucket.name] = buckets.get(bucket.name, 0.0) + count / total
        share = bucket.width * bucket.height / (place.scaled_width * place.scaled_height)
        kept += count * (bucket.name not in names)
        upscaled += count * (place.scaled_width > width or place.scaled_height > height)
        cropped += count * (share < 1)
        lost += count * (1 - share)
        positions += count * bucket.latent_width * bucket.latent_height
    encoded = max(len(known) - skipped, 1)
    return Placements(
        buckets=dict(sorted(buckets.items(), key=lambda item: (-item[1], item[0]))),
        skipped=skipped / total,
        unreadable=sample.unreadable,
        upscaled=upscaled / total,
        kept_small=kept / total,
        cropped=cropped / total,
        area_lost=lost / encoded,
        positions=positions / encoded,
    )
