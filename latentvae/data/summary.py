"""What training will see, said in a few lines before it starts."""

from collections.abc import Sequence

import numpy as np

from latentvae.data.aspect import assign, image_sizes
from latentvae.data.augment import DataConfig
from latentvae.data.entries import ImageSource
from latentvae.data.grouping import bucket_groups, groups_by_source
from latentvae.data.mixture import MixtureSource

_NAMED = 8  # buckets that are listed one by one


def plan_summary(
    config: DataConfig,
    source: ImageSource,
    *,
    indices: Sequence[int] | None = None,
    global_batch_size: int = 1,
    sizes: np.ndarray | None = None,
    progress: bool = True,
) -> list[str]:
    """A line each for the images, and for the curriculum and the aspect-ratio buckets where there are any.

    Arguments are those of `training_batches`; without `sizes` those of all images are read where there are buckets.
    """
    chosen = np.arange(len(source)) if indices is None else np.asarray(indices, np.int64)
    groups = groups_by_source(source, config, chosen)
    parts = list(source.parts.values()) if isinstance(source, MixtureSource) else [source]
    counts = [
        f"{len(group.indices):,} in {part.name}" + (f" x {float(group.repeats):g}" if group.repeats != 1 else "")
        for group, part in zip(groups, parts, strict=True)
    ]
    epoch = float(sum(len(group.indices) * group.repeats for group in groups))
    lines = [f"images      {', '.join(counts)}: {round(epoch):,} an epoch"]
    if config.curriculum:
        stages = [f"{stage.resolution} px from image {stage.from_image:,}" for stage in config.curriculum]
        lines.append(f"curriculum  {', '.join(stages)}")
    if config.aspect_buckets is None:
        return lines
    if sizes is None:
        sizes = image_sizes(source, config.policy, num_workers=config.num_workers, progress=progress)
    shapes = config.aspect_buckets.sizes(config.resolution)
    before = np.bincount(assign(sizes[chosen], shapes), minlength=len(shapes))
    merged = bucket_groups(source, config, groups, global_batch_size, sizes)
    after = {number: sum(len(group.indices) for group in own) for number, own in merged.items()}
    ordered = sorted(after, key=lambda number: -after[number])
    shown = [f"{shapes[number][0]}x{shapes[number][1]} {after[number]:,}" for number in ordered[:_NAMED]]
    if len(ordered) > _NAMED:
        shown.append(f"{len(ordered) - _NAMED} more {sum(after[number] for number in ordered[_NAMED:]):,}")
    text = f"buckets     {', '.join(shown)}"
    moved = int(sum(before[number] for number in range(len(shapes)) if number not in after))
    if moved:
        text += f"; {moved:,} of these from buckets that fill no batch of {global_batch_size}"
    unknown = int((sizes[chosen] < 1).any(1).sum())
    return [*lines, text + (f"; {unknown:,} of unknown size among the squares" if unknown else "")]
