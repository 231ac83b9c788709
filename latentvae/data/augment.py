"""Which images are trained on, and how each is cut: resized, cropped and flipped as its key decides."""

from typing import Literal

import numpy as np
from pydantic import BaseModel, Field, model_validator

from latentvae.data.entries import ImageSource
from latentvae.data.sources import open_source
from latentvae.images import (
    DecodePolicy,
    ImageError,
    PixelFormat,
    center_crop,
    resize,
    resize_shorter_side,
    shorter_side_size,
)
from latentvae.images.pixels import PixelDtype
from latentvae.keyed import uniforms


class DataConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Which images are trained on, and how they are cut."""

    source: str | None = Field(
        default=None,
        description="folder of images (searched in depth), .tar or .parquet files, a .txt or .jsonl list of paths, "
        "hf:owner/name, or python:module:function",
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
        description="images whose shorter side is below resolution: enlarge them, or treat them as unreadable",
    )
    policy: DecodePolicy = Field(default=DecodePolicy(), description="how image files become arrays")
    max_unreadable: int = Field(
        default=100, ge=0, description="distinct unreadable images that are skipped and named before the run stops"
    )

    @model_validator(mode="after")
    def _check_pixels(self) -> "DataConfig":
        if self.dtype == "float32" and self.pixel_range is None:
            raise ValueError("dtype float32 has no natural range: give pixel_range, such as [0, 1]")
        return self

    def open(self, pixels: PixelFormat) -> ImageSource:
        """The source of training images, listed. Raises UserError where it cannot be one."""
        source = open_source(
            self.source,
            pixels,
            self.policy,
            key_column=self.key_column,
            image_column=self.image_column,
            streaming=self.streaming,
            split=self.split,
        )
        source.entries()  # what is wrong with it is told before a run begins
        return source

    def pixels(self, channels: int) -> PixelFormat:
        """The pixel format of a model with `channels` input channels."""
        return PixelFormat(channels=channels, dtype=self.dtype, range=self.pixel_range)


def augment(image: np.ndarray, config: DataConfig, seed: int, epoch: int, key: str) -> np.ndarray:
    """Resize, crop and flip (H, W, C) => (resolution, resolution, C), as (seed, epoch, key) decide."""
    scale, across, down, flip = uniforms("augment", seed, epoch, key)
    height, width = image.shape[:2]
    if config.small == "skip" and min(height, width) < config.resolution:
        raise ImageError(f"is {width}x{height}: smaller than the resolution {config.resolution} (data.small is skip)")
    side = config.resolution
    if config.crop == "random":
        largest = min(config.max_resize, max(1.0, min(height, width) / side))
        resized_width, resized_height = shorter_side_size(width, height, round(side * (1.0 + scale * (largest - 1.0))))
        left = int(across * (resized_width - side + 1))
        top = int(down * (resized_height - side + 1))
        # one resampling straight to the crop: the rest of the resized picture is never computed
        across_step, down_step = width / resized_width, height / resized_height
        box = (
            left * across_step,
            top * down_step,
            min((left + side) * across_step, width),
            min((top + side) * down_step, height),
        )
        image = resize(image, (side, side), box=box)
    else:
        image = center_crop(resize_shorter_side(image, side), side)
    if config.horizontal_flip and flip < 0.5:
        image = image[:, ::-1]
    return np.ascontiguousarray(image)
