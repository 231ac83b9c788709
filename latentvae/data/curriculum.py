"""Training at rising resolution: which stage an optimizer step belongs to."""

import itertools
from collections.abc import Sequence

from pydantic import BaseModel, Field


class Stage(BaseModel, extra="forbid", frozen=True):
    """A part of a run at one resolution, up to the next stage."""

    from_image: int = Field(ge=0, description="images seen when it begins; 0 for the first stage")
    resolution: int = Field(ge=8, description="side of the square training images, pixels; a multiple of the model's f")


def check_stages(stages: Sequence[Stage], resolution: int) -> None:
    """Raise ValueError where stages are out of order, or end at another resolution than `resolution`."""
    if not stages:
        return
    starts = [stage.from_image for stage in stages]
    if starts[0] != 0 or any(one >= other for one, other in itertools.pairwise(starts)):
        raise ValueError(f"the stages of curriculum begin at images {starts}: the first must be 0, and each later")
    if stages[-1].resolution != resolution:
        raise ValueError(
            f"resolution is {resolution} and the last stage of curriculum has {stages[-1].resolution}: "
            "give both the same"
        )


def resolution_at(stages: Sequence[Stage], images_seen: int) -> int:
    """Of the last stage that has begun when the step after `images_seen` images begins; there is at least one stage."""
    return next(stage.resolution for stage in reversed(stages) if stage.from_image <= images_seen)
