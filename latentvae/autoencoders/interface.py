"""What every image autoencoder can do here, whatever its class."""

import copy
import json
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from latentvae.files import canonical_json
from latentvae.model.hashes import weights_hash
from latentvae.model.scaling import LatentScaling


class ImageAutoencoder(ABC):
    """A diffusers autoencoder for single images, with the latent scaling that its pipelines apply.

    Letters in shapes: B images, C image channels, H x W pixels, D latent channels, h x w = H/f x W/f positions.
    Gradients, autocast and train or eval mode are the caller's, through `module`. Whatever the module's tiling and
    slicing switches say, an image is encoded and decoded whole.
    """

    encoder_fields: ClassVar[tuple[str, ...]]  # of config.json, that decide what the encoder computes
    decoder_fields: ClassVar[tuple[str, ...]]
    has_posterior: ClassVar[bool] = True  # False: deterministic, and `moments` gives the latents alone

    def __init__(self, module: Any, name: str | None = None) -> None:
        """`module`: the diffusers model, used as it is; `name`: the folder, hub id or file it came from."""
        self.module = module
        self.name = name
        public = {key: value for key, value in module.config.items() if not key.startswith("_")}
        self.config: dict[str, Any] = json.loads(canonical_json(public)) | {"_class_name": self.class_name}

    @property
    def class_name(self) -> str:
        """As in config.json: "AutoencoderKL", "AutoencoderTiny", ..."""
        return type(self.module).__name__

    @property
    def in_channels(self) -> int:
        """C: of the images that `moments` takes."""
        return int(self.config["in_channels"])

    @property
    def latent_channels(self) -> int:
        """D: of the raw latents."""
        return int(self.config["latent_channels"])

    @property
    @abstractmethod
    def downsample_factor(self) -> int:
        """f: pixels per latent position along each side."""

    @property
    def size_multiple(self) -> int:
        """H and W must be multiples of it: f, times the side of the squares in which latents are normalized."""
        return self.downsample_factor * self.scaling.patch

    @property
    def scaling(self) -> LatentScaling:
        """raw <-> normalized latents. UserError where the model's config.json contradicts itself."""
        return LatentScaling.from_config(self.config)

    @abstractmethod
    def moments(self, images: Tensor) -> Tensor:
        """images [-1, 1] (B, C, H, W) => mean and log variance of the raw latents (B, 2D, h, w).

        (B, D, h, w), the latents themselves, where `has_posterior` is False.
        """

    @abstractmethod
    def decode(self, raw: Tensor) -> Tensor:
        """raw latents (B, D, h, w) => images, nominally [-1, 1] and not clamped (B, C, H, W)."""

    @cached_property
    def encoder_hash(self) -> str:
        """Hex sha256 of what makes raw latents: the encoder's weights and their dtype, and its architecture."""
        return self._hash(self.encoder_fields, ("encoder.", "quant_conv."))

    @cached_property
    def decoder_hash(self) -> str:
        """Hex sha256 of what makes images from raw latents."""
        return self._hash(self.decoder_fields, ("decoder.", "post_quant_conv."))

    def _hash(self, names: tuple[str, ...], prefixes: tuple[str, ...]) -> str:
        architecture = {name: self.config[name] for name in ("_class_name", *names)}
        return weights_hash(architecture, self.module.state_dict(), prefixes)

    def to(self, device: torch.device | str) -> Self:
        """Move the module itself to a device."""
        self.module.to(device)
        return self

    def float(self) -> Self:
        """This one if its weights are float32, else one around a float32 copy, whose hashes are its own."""
        dtypes = {tensor.dtype for tensor in self.module.state_dict().values() if tensor.is_floating_point()}
        if dtypes <= {torch.float32}:
            return self
        return type(self)(copy.deepcopy(self.module).float(), self.name)
