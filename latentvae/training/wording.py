"""How the figures of a run are written for a reader: images, seconds, bytes, and what changes when."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_MINOR = ("_grad_norm", "_logits", "learning_rate", "images_per_second", "memory_bytes", "images_seen")


def short_images(images: float) -> str:
    """950 => 950, 12_800 => 12.8k, 2_500_000 => 2.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(images) >= size:
            return f"{images / size:.4g}{letter}"
    return f"{images:.4g}"


def duration(seconds: float) -> str:
    """The two largest units: 45 s, 12 min, 2 h 05 min, 3 d 04 h."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{hours // 24} d {hours % 24:02d} h"


def size(num_bytes: float) -> str:
    """In units of 1024, as the tools of GPUs and memory count them: 3.2 GiB."""
    exponent = min(int(math.log2(max(num_bytes, 1)) // 10), 4)
    value = num_bytes / 1024**exponent
    unit = ("bytes", "KiB", "MiB", "GiB", "TiB")[exponent]
    return f"{value:.0f} {unit}" if exponent == 0 or value >= 100 else f"{value:.1f} {unit}"


def progress_line(images_seen: int, total_images: int, images_per_second: float) -> str:
    """`12,800 of 100,000 images (12.8%), 35 min left`; the time is left out where it is not known."""
    line = f"{images_seen:,} of {total_images:,} images ({min(images_seen / total_images, 1):.1%})"
    if images_per_second > 0 and images_seen < total_images:
        line += f", {duration((total_images - images_seen) / images_per_second)} left"
    return line


def main_figures(figures: Mapping[str, Any]) -> str:
    """`reconstruction 0.1234, kl 5.1`: the terms among what a log interval gave; norms and logits are for the files."""
    shown = {name: value for name, value in figures.items() if not name.endswith(_MINOR) and isinstance(value, float)}
    return ", ".join(f"{name} {value:.4g}" for name, value in shown.items())


@dataclass(frozen=True)
class Change:
    """Something that is different from this many images on."""

    images: int
    what: str


def changes_planned(settings: Mapping[str, Any]) -> list[Change]:
    """What a resolved recipe changes in the middle of a run, in the order of images; nothing at its very beginning."""
    loss, training, data = (settings.get(name) or {} for name in ("loss", "training", "data"))
    found = [("autoencoder trains", loss.get("autoencoder_start"))]
    if loss.get("adversarial_weight"):
        found += [
            ("discriminator trains", loss.get("discriminator_start")),
            ("adversarial term", loss.get("adversarial_start")),
        ]
    if loss.get("kl_schedule") == "linear":
        found.append(("whole KL weight", loss.get("kl_warmup_images")))
    found.append(("decoder only", training.get("decoder_only_start")))
    found += [(f"{stage['resolution']} px", stage["from_image"]) for stage in data.get("curriculum") or ()]
    total = training.get("total_images") or math.inf
    return sorted((Change(at, what) for what, at in found if at and at < total), key=lambda change: change.images)
