"""The settings of an encoding run, and which of them decide the bytes of the store."""

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import PIL
import torch
from pydantic import BaseModel, Field, ValidationError

from latentvae.checkpoint import load_model
from latentvae.errors import UserError
from latentvae.images import DecodePolicy, PixelFormat
from latentvae.images.geometry import ResizeFilter
from latentvae.latents.encoder import Precision
from latentvae.latents.fingerprint import plain
from latentvae.latents.preprocess import SmallPolicy
from latentvae.latents.records import SCHEMA, Bucket, StoreDtype, StoreKind
from latentvae.model.autoencoder import AutoencoderKL


class EncodeConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """How images become latents. What changes them is in the store's fingerprint; the rest may change on resume."""

    resolution: int = Field(
        default=256, ge=1, description="pixels: the shorter side is resized to it, then the centre square is cut out"
    )
    filter: ResizeFilter = Field(default="bicubic", description="of the resize, antialiased")
    small: SmallPolicy = Field(
        default="skip", description="images smaller than the resolution: leave out and count, or enlarge"
    )
    policy: DecodePolicy = Field(default_factory=DecodePolicy, description="how image files become arrays")
    pixels: PixelFormat | None = Field(
        default=None, description="of the images; None: 8 bits and as many channels as the model takes"
    )
    store: StoreKind = Field(default="moments", description="mean and logvar, the mean alone, or one sample")
    dtype: StoreDtype = Field(
        default="fp16", description="of the stored latents (rounding at |x| = 4: fp16 9e-4, bf16 7e-3)"
    )
    precision: Precision = Field(
        default="fp32", description="of the encoder's arithmetic; the weights stay as they are"
    )
    seed: int = Field(default=0, ge=0, description="of the noise of store: sample")
    batch_size: int = Field(default=16, ge=1, description="images per forward; shorter batches are padded to it")
    unit_images: int = Field(default=1024, ge=1, description="images per shard at most, for images not planned yet")
    num_workers: int = Field(
        default=min(8, os.cpu_count() or 1), ge=0, description="processes that read images; 0: this process does"
    )
    device: str | None = Field(
        default=None, description="such as cuda:1; None: the accelerator where there is one, else cpu"
    )
    strict: bool = Field(default=False, description="an error at the end where any image could not be encoded")


def resolved_config(config: EncodeConfig | None, options: Mapping[str, Any]) -> EncodeConfig:
    """`options` over `config` over the defaults; a UserError names the first field that does not fit."""
    given = {name: getattr(config, name) for name in config.model_fields_set} if config else {}
    try:
        return EncodeConfig(**(given | dict(options)))
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            raise UserError(f"unknown option {name}; known: {', '.join(EncodeConfig.model_fields)}") from error
        raise UserError(f"{name} is {problem['input']!r}: {problem['msg']}") from error


def resolved_device(name: str | None) -> torch.device:
    """The device of that name; None: the accelerator where there is one, else the CPU."""
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def resolved_model(vae: diffusers.AutoencoderKL | str | Path) -> AutoencoderKL:
    """Our class: what was given if it is one, else around plain diffusers' tensors, else what `load_model` finds."""
    if isinstance(vae, AutoencoderKL):
        return vae
    return load_model(vae) if isinstance(vae, str | Path) else AutoencoderKL.from_diffusers(vae)


def bucket_of(config: EncodeConfig, model: AutoencoderKL) -> Bucket:
    """The one size of a store made at `config.resolution`."""
    side, factor = config.resolution, model.downsample_factor
    if side % factor:
        below = side // factor * factor
        near = " and ".join(str(size) for size in (below, below + factor) if size)
        raise UserError(
            f"--resolution is {side}; it must be a multiple of {factor}, the model's downsample factor: {near} would do"
        )
    return Bucket(width=side, height=side, latent_width=side // factor, latent_height=side // factor)


def fingerprint_fields(config: EncodeConfig, encoder_hash: str, bucket: Bucket, pixels: PixelFormat) -> dict[str, Any]:
    """Everything that decides the stored latents, but for what changes their last bits alone."""
    return plain(
        {
            "schema_version": SCHEMA,
            "encoder": encoder_hash,
            "precision": config.precision,
            "tiling": False,
            "buckets": [bucket.name],
            "crop": "center",
            "filter": config.filter,
            "small": config.small,
            "policy": config.policy.model_dump(),
            "pixels": {"channels": pixels.channels, "dtype": pixels.dtype, "range": [pixels.low, pixels.high]},
            "store": config.store,
            "dtype": config.dtype,
            "seed": config.seed if config.store == "sample" else None,
        }
    )


def environment(config: EncodeConfig, device: torch.device) -> dict[str, Any]:
    """What changes the last bits: with an equal one, encoding the same unit again gives the same bytes."""
    return {
        "batch_size": config.batch_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "pillow": PIL.__version__,
        "machine": platform.machine(),
    }
