"""The settings of an encoding run, and which of them decide the bytes of the store."""

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import diffusers
import PIL
import torch
from pydantic import BaseModel, Field, ValidationError, model_validator

from latentvae.autoencoders.adapter import ImageAutoencoder
from latentvae.data.entries import ImageSource
from latentvae.errors import UserError
from latentvae.images import DecodePolicy, PixelFormat
from latentvae.images.geometry import ResizeFilter
from latentvae.latents.encoding.encoder import Precision
from latentvae.latents.store.buckets import BucketRule, SmallPolicy, bucket_rule, square_rule
from latentvae.latents.store.files import LatentStore
from latentvae.latents.store.fingerprint import fingerprint, plain
from latentvae.latents.store.records import SCHEMA, Manifest, StoreDtype, StoreKind, VAERecord

DEFAULT_RESOLUTION = 256
UNION_BRANCHES = ("int", "literal['auto']")  # pydantic puts them behind the name of a field that is a number or a word


class EncodeConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """How images become latents. What changes them is in the store's fingerprint; the rest may change on resume."""

    resolution: int | None = Field(
        default=None,
        ge=1,
        description="pixels: the shorter side is resized to it, then the centre square is cut out; "
        f"None: {DEFAULT_RESOLUTION}, or what `buckets` says",
    )
    buckets: str | None = Field(
        default=None, description="sizes by aspect ratio: sdxl, or such as area=1048576,step=64,max-ratio=4"
    )
    filter: ResizeFilter = Field(default="bicubic", description="of the resize, antialiased")
    small: SmallPolicy = Field(
        default="skip",
        description="images smaller than their bucket: leave out and count, keep at their size, or enlarge",
    )
    policy: DecodePolicy = Field(default_factory=DecodePolicy, description="how image files become arrays")
    pixels: PixelFormat | None = Field(
        default=None, description="of the images; None: 8 bits. Channels not given: as many as the model takes"
    )
    store: StoreKind | Literal["auto"] | None = Field(
        default=None,
        description="mean and logvar, the mean alone, or one sample; auto: the mean alone where the posterior is "
        "narrower than the rounding of `dtype`; None: moments, or the mean of a model without a posterior",
    )
    dtype: StoreDtype = Field(
        default="fp16", description="of the stored latents (rounding at |x| = 4: fp16 9e-4, bf16 7e-3)"
    )
    hflip: bool = Field(default=False, description="encode every image mirrored too")
    precision: Precision = Field(
        default="fp32", description="of the encoder's arithmetic; the weights stay as they are"
    )
    seed: int = Field(default=0, ge=0, description="of the noise of store: sample")
    batch_size: int | Literal["auto"] = Field(
        default=16, description="images per forward; shorter batches are padded to it; auto: measured for each bucket"
    )
    unit_images: int = Field(default=1024, ge=1, description="images per unit at most, for images not planned yet")
    num_workers: int = Field(
        default=min(8, os.cpu_count() or 1), ge=0, description="processes that read images; 0: this process does"
    )
    device: str | None = Field(
        default=None, description="such as cuda:1; None: the accelerator where there is one, else cpu"
    )
    lease_seconds: float = Field(
        default=300.0, ge=1.0, description="without a sign of life, after which another process takes a unit over"
    )
    engine: Literal["local", "ray"] = Field(
        default="local", description="encode in the processes that were started, or in actors on a Ray cluster"
    )
    ray_address: str | None = Field(
        default=None, description="of the cluster; None: RAY_ADDRESS, or a Ray of its own on this machine"
    )
    ray_actors: int | None = Field(
        default=None, ge=1, description="None: one per GPU of the cluster, or as many as its CPUs have room for"
    )
    retry_errors: bool = Field(default=False, description="encode the units again in which images failed")
    strict: bool = Field(default=False, description="an error at the end where any image could not be encoded")
    streaming: bool = Field(default=False, description="read a Hugging Face dataset in place, without a download")
    split: str | None = Field(default=None, description="of a Hugging Face dataset")
    image_column: str | None = Field(default=None, description="of a table; None: the one that holds images")
    key_column: str | None = Field(default=None, description="of a table; None: key, __key__ or id, else row numbers")
    subfolder: str | None = Field(default=None, description="of the VAE inside a hub repository or folder")
    revision: str | None = Field(default=None, description="branch, tag or commit of the VAE on the hub")
    variant: str | None = Field(default=None, description="of the VAE's weight files, such as fp16")

    @model_validator(mode="after")
    def _check(self) -> "EncodeConfig":
        if self.resolution is not None and self.buckets is not None:
            raise ValueError("give --resolution or --buckets, not both")
        if self.batch_size != "auto" and self.batch_size < 1:
            raise ValueError("batch_size must be 1 or more, or auto")
        if self.engine != "ray" and (self.ray_address is not None or self.ray_actors is not None):
            raise ValueError("ray_address and ray_actors are for the engine ray: give --engine ray too")
        return self

    @property
    def source_options(self) -> dict[str, Any]:
        """As `open_source` takes them, those that were given."""
        names = ("streaming", "split", "image_column", "key_column")
        return {name: value for name in names if (value := getattr(self, name))}

    @property
    def load_options(self) -> dict[str, str | None]:
        """As `load_autoencoder` takes them."""
        return {"subfolder": self.subfolder, "revision": self.revision, "variant": self.variant}


def resolved_config(config: EncodeConfig | None, options: Mapping[str, Any]) -> EncodeConfig:
    """`options` over `config` over the defaults; a UserError names the first field that does not fit."""
    given = {name: getattr(config, name) for name in config.model_fields_set} if config else {}
    try:
        return EncodeConfig(**(given | dict(options)))
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in problem["loc"] if part not in UNION_BRANCHES)
        if problem["type"] == "extra_forbidden":
            raise UserError(f"unknown option {name}; known: {', '.join(EncodeConfig.model_fields)}") from error
        reason = problem["msg"].removeprefix("Value error, ")
        raise UserError(f"{name} is {problem['input']!r}: {reason}" if name else reason) from error


def rule_of(config: EncodeConfig, vae: ImageAutoencoder) -> BucketRule:
    """The buckets of a store."""
    if config.buckets is not None:
        return bucket_rule(config.buckets, vae.downsample_factor, vae.size_multiple, config.small)
    side = DEFAULT_RESOLUTION if config.resolution is None else config.resolution
    return square_rule(side, vae.downsample_factor, vae.size_multiple, config.small)


def pixels_of(config: EncodeConfig, vae: ImageAutoencoder) -> PixelFormat:
    """The format of the images, which must be what the model takes."""
    pixels = config.pixels or PixelFormat()
    if "channels" not in pixels.model_fields_set:
        pixels = pixels.model_copy(update={"channels": vae.in_channels})
    if pixels.channels != vae.in_channels:
        raise UserError(f"images have {pixels.channels} channels, and the model takes {vae.in_channels}")
    return pixels


def store_kind_of(config: EncodeConfig, vae: ImageAutoencoder) -> StoreKind | Literal["auto"]:
    """What is to be kept of the posterior; `auto` where that is to be measured."""
    if vae.has_posterior:
        return config.store or "moments"
    if config.store not in (None, "auto", "mean"):
        raise UserError(f"--store is {config.store}; a {vae.class_name} has no posterior, only --store mean")
    return "mean"


def fingerprint_fields(
    config: EncodeConfig, store: StoreKind, encoder_hash: str, rule: BucketRule, pixels: PixelFormat
) -> dict[str, Any]:
    """Everything that decides the stored latents, but for what changes their last bits alone."""
    return plain(
        {
            "schema_version": SCHEMA,
            "encoder": encoder_hash,
            "precision": config.precision,
            "tiling": False,
            "buckets": rule.spec,
            "crop": "center",
            "filter": config.filter,
            "small": config.small,
            "policy": config.policy.model_dump(),
            "pixels": {"channels": pixels.channels, "dtype": pixels.dtype, "range": [pixels.low, pixels.high]},
            "store": store,
            "dtype": config.dtype,
            "hflip": config.hflip,
            "seed": config.seed if store == "sample" else None,
        }
    )


@dataclass
class Task:
    """What is to be encoded, into which store, and how."""

    source: ImageSource
    vae: ImageAutoencoder
    store: LatentStore
    rule: BucketRule
    pixels: PixelFormat
    config: EncodeConfig


def new_manifest(task: Task, store: StoreKind) -> Manifest:
    """Of a store that is to be begun."""
    vae, config = task.vae, task.config
    fields = fingerprint_fields(config, store, vae.encoder_hash, task.rule, task.pixels)
    record = VAERecord(
        name=vae.name,
        class_name=vae.class_name,
        encoder=vae.encoder_hash,
        decoders=[vae.decoder_hash],
        config=vae.config,
        scaling=vae.scaling.to_dict(),
        **config.load_options,
    )
    return Manifest(
        fingerprint=fingerprint(fields),
        fields=fields,
        store=store,
        dtype=config.dtype,
        hflip=config.hflip,
        latent_channels=vae.latent_channels,
        buckets=list(task.rule.buckets),
        vae=record,
        source=task.source.name,
        source_options=config.source_options,
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
