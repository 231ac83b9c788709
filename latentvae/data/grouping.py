"""Which training images are drawn together: those of one aspect-ratio bucket, in groups that an epoch repeats alike."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from latentvae.data.aspect import assign, image_sizes, merge
from latentvae.data.augment import DataConfig
from latentvae.data.entries import ImageSource
from latentvae.data.mixture import MixtureSource
from latentvae.data.order import Group
from latentvae.errors import UserError


def groups_by_source(source: ImageSource, config: DataConfig, indices: np.ndarray) -> list[Group]:
    """The entries `indices` (n,) of each source of a mixture, or of the only one, with its repeats."""
    repeats = [Fraction(str(each.repeats)) for each in config.sources] or [Fraction(1)]
    if len(repeats) == 1:
        return [Group(indices, repeats[0])]
    if not isinstance(source, MixtureSource) or len(source.parts) != len(repeats):
        raise UserError(f"{source.name} is not the mixture of data.sources: open it with DataConfig.open")
    numbers = np.searchsorted(source.bounds, indices, side="right") - 1
    return [Group(indices[numbers == number], each) for number, each in enumerate(repeats)]


def bucket_groups(
    source: ImageSource,
    config: DataConfig,
    groups: Sequence[Group],
    global_batch_size: int,
    sizes: np.ndarray | None = None,
) -> dict[int, list[Group]]:
    """Bucket => its groups, one for each of `groups`; a bucket that does not fill a batch is merged into another.

    Buckets are numbers of `config.aspect_buckets.sizes(config.resolution)`; all is bucket 0 where there are none.
    `sizes` are those of `image_sizes` for the whole source; None: they are read.
    """
    buckets = config.aspect_buckets
    if buckets is None:
        return {0: list(groups)}
    if sizes is None:
        sizes = image_sizes(source, config.policy, progress=False)
    if sizes.shape != (len(source), 2):
        raise ValueError(f"sizes are {sizes.shape}: a width and a height are needed for each of {len(source)} entries")
    shapes = buckets.sizes(config.resolution)
    homes = [assign(sizes[group.indices], shapes) for group in groups]
    rates = [Fraction(0)] * len(shapes)
    for group, numbers in zip(groups, homes, strict=True):
        for number, count in enumerate(np.bincount(numbers, minlength=len(shapes)).tolist()):
            rates[number] += count * group.repeats
    merged = np.array(merge(rates, shapes, global_batch_size), np.int16)
    homes = [merged[numbers] for numbers in homes]
    used = sorted({number for numbers in homes for number in np.unique(numbers).tolist()})
    return {
        used_number: [
            Group(group.indices[numbers == used_number], group.repeats)
            for group, numbers in zip(groups, homes, strict=True)
        ]
        for used_number in used
    }
