"""Which images are trained on, and how each is cut: resized, cropped and flipped as its key decides."""

from typing import Literal

import numpy as np
from pydantic import BaseModel, Field, model_validator

from latentvae.data.aspect import AspectBuckets, Size
from latentvae.data.curriculum import Stage, check_stages, resolution_at
from latentvae.data.entries import ImageSource
from latentvae.data.mixture import SourceConfig, open_sources, source_names
from latentvae.errors import UserError
from latentvae.images import DecodePolicy, ImageError, PixelFormat, covering_size, crop, resize
from latentvae.images.pixels import PixelDtype
from latentvae.keyed import uniforms


class DataConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Which images are trained on, and how they are cut."""

    source: str | None = Field(
        default=None,
        description="folder of images (searched in depth), .tar or .parquet files, a .txt or .jsonl list of paths, "
        "hf:owner/name, or python:module:function",
    )
    sources: tuple[SourceConfig, ...] = Field(
        default=(),
        description="several in place of source: a list of {source, repeats, name, key_column, image_column, "
        "streaming, split}; repeats is how often an epoch holds each of its images",
    )
    key_column: str | None = Field(
        default=None, description="column that names the images of a dataset; null: key, __key__ or id, else the row"
    )
    image_column: str | None = Field(
        default=None, description="column of encoded images of a dataset; null: the only one there is"
    )
    streaming: bool = Field(
        default=False, description="read the files of a hub dataset in place instead of downloading all of them first"
    )
    split: str | None = Field(default=None, description="split of a dataset; null: the only one there is")
    resolution: int = Field(
        default=256, ge=8, description="side of the square training images, pixels; a multiple of the model's f"
    )
    curriculum: tuple[Stage, ...] = Field(
        default=(),
        description="training at rising resolution: a list of {from_image, resolution}, the first from image 0, the "
        "last at resolution; a step belongs to the stage that has begun before it",
    )
    aspect_buckets: AspectBuckets | None = Field(
        default=None,
        description="{max_aspect, multiple_of}: images keep about their shape, in sizes of about resolution^2 pixels, "
        "one size a step; null: all are square",
    )
    num_workers: int = Field(
        default=2, ge=0, le=256, description="worker processes that decode images, per training process; 0: none"
    )
    crop: Literal["random", "center"] = Field(
        default="random", description="square cut out of the resized image: at random or the middle"
    )
    max_resize: float = Field(
        default=1.5,
        ge=1.0,
        le=8.0,
        description="before a random crop the shorter side becomes 1 to this many times resolution, at random (RAE); "
        "images are never enlarged for it beyond resolution",
    )
    horizontal_flip: bool = Field(default=True, description="mirror every other training image, at random")
    dtype: PixelDtype = Field(default="uint8", description="sample type of the images: uint8, uint16 or float32")
    pixel_range: tuple[float, float] | None = Field(
        default=None, description="(lowest, highest) sample value; null: all that dtype can hold (float32 must say)"
    )
    small: Literal["upscale", "skip"] = Field(
        default="upscale",
        description="images smaller than what is cut out of them: enlarge them, or treat them as unreadable",
    )
    policy: DecodePolicy = Field(default=DecodePolicy(), description="how image files become arrays")
    max_unreadable: int = Field(
        default=100, ge=0, description="distinct unreadable images that are skipped and named before the run stops"
    )

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.dtype == "float32" and self.pixel_range is None:
            raise ValueError("dtype float32 has no natural range: give pixel_range, such as [0, 1]")
        check_stages(self.curriculum, self.resolution)
        source_names(self.sources)
        if self.aspect_buckets is not None:
            self.aspect_buckets.check(self.resolutions)
        return self

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """Those of `sources`, or the one of `source`. Raises UserError for both or neither."""
        if self.source is None and not self.sources:
            raise UserError("data.source is not set: pass --set data.source=FOLDER")
        if self.source is None:
            for name in ("key_column", "image_column", "streaming", "split"):
                if getattr(self, name):
                    raise UserError(f"data.{name} is set beside data.sources: set it in the source that it is for")
            return self.sources
        if self.sources:
            raise UserError("data.source and data.sources are both set: put all of them into data.sources")
        return (
            SourceConfig(
                source=self.source,
                key_column=self.key_column,
                image_column=self.image_column,
                streaming=self.streaming,
                split=self.split,
            ),
        )

    def open(self, pixels: PixelFormat) -> ImageSource:
        """The source of training images, listed. Raises UserError where it cannot be one."""
        source = open_sources(self.all_sources, pixels, self.policy)
        source.entries()  # what is wrong with it is told before a run begins
        return source

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Of all stages, in their order."""
        return tuple(stage.resolution for stage in self.curriculum) or (self.resolution,)

    @property
    def image_sizes(self) -> tuple[Size, ...]:
        """(width, height) of all that training images may be cut to."""
        buckets = self.aspect_buckets
        if buckets is None:
            return tuple((side, side) for side in dict.fromkeys(self.resolutions))
        return tuple(dict.fromkeys(size for side in self.resolutions for size in buckets.sizes(side)))

    def resolution_at(self, images_seen: int) -> int:
        """Of the step that begins after so many images."""
        return resolution_at(self.curriculum, images_seen) if self.curriculum else self.resolution

    def size_at(self, bucket: int, images_seen: int) -> Size:
        """(width, height) of a bucket in the step that begins after so many images; without buckets the square."""
        side = self.resolution_at(images_seen)
        if self.aspect_buckets is None:
            return side, side
        return self.aspect_buckets.size_at(bucket, self.resolution, side)

    def pixels(self, channels: int) -> PixelFormat:
        """The pixel format of a model with `channels` input channels."""
        return PixelFormat(channels=channels, dtype=self.dtype, range=self.pixel_range)


def augment(
    image: np.ndarray,
    config: DataConfig,
    seed: int,
    epoch: int,
    key: str,
    *,
    size: Size | None = None,
    copy: int = 0,
) -> np.ndarray:
    """Resize, crop and flip (H, W, C) => (height, width, C), as (seed, epoch, key, copy) decide.

    Args:
        size: (width, height) of the result in pixels; None: a square of config.resolution.
        copy: number of this copy of the image in its epoch.
    """
    # without copies the key is what it was before there were any: runs go on as they began
    scale, across, down, flip = uniforms("augment", seed, epoch, key, *([copy] if copy else []))
    height, width = image.shape[:2]
    wide, high = size = size or (config.resolution, config.resolution)
    if config.small == "skip" and (width < wide or height < high):
        needed = f"the resolution {wide}" if wide == high else f"its bucket of {wide}x{high}"
        raise ImageError(f"is {width}x{height}: smaller than {needed} (data.small is skip)")
    if config.crop == "random":
        largest = min(config.max_resize, max(1.0, min(height / high, width / wide)))
        resized_width, resized_height = covering_size(width, height, size, 1.0 + scale * (largest - 1.0))
        left = int(across * (resized_width - wide + 1))
        top = int(down * (resized_height - high + 1))
        # one resampling straight to the crop: the rest of the resized picture is never computed
        across_step, down_step = width / resized_width, height / resized_height
        box = (
            left * across_step,
            top * down_step,
            min((left + wide) * across_step, width),
            min((top + high) * down_step, height),
        )
        image = resize(image, size, box=box)
    else:
        covering = covering_size(width, height, size)
        image = crop(resize(image, covering), (covering[1] - high) // 2, (covering[0] - wide) // 2, high, wide)
    if config.horizontal_flip and flip < 0.5:
        image = image[:, ::-1]
    return np.ascontiguousarray(image)
