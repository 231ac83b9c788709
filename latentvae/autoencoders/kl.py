"""The image autoencoders with a posterior: AutoencoderKL (SD 1.x, SDXL, SD3, FLUX.1), its asymmetric form, FLUX.2's."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from latentvae.autoencoders.interface import ImageAutoencoder
from latentvae.checkpoint import ModelHashes, model_hashes
from latentvae.errors import UserError
from latentvae.model.scaling import LatentScaling


class KLAdapter(ImageAutoencoder):
    """`AutoencoderKL`: ours, around any weights of that class."""

    @property
    def downsample_factor(self) -> int:
        return int(self.module.downsample_factor)

    def moments(self, images: Tensor) -> Tensor:
        moments: Tensor = self.module.moments(images)
        return moments

    def decode(self, raw: Tensor) -> Tensor:
        return _decode(self.module, raw)

    @cached_property
    def _hashes(self) -> ModelHashes:
        return model_hashes(self.module)

    @property
    def encoder_hash(self) -> str:
        return self._hashes.encoder

    @property
    def decoder_hash(self) -> str:
        return self._hashes.decoder


class AsymmetricKLAdapter(ImageAutoencoder):
    """`AsymmetricAutoencoderKL`: decoded without the image and mask that its inpainting pipelines may give."""

    _shared = ("act_fn", "latent_channels", "norm_num_groups")
    encoder_fields = ("in_channels", "down_block_types", "down_block_out_channels", "layers_per_down_block", *_shared)
    decoder_fields = ("out_channels", "up_block_types", "up_block_out_channels", "layers_per_up_block", *_shared)

    @property
    def downsample_factor(self) -> int:
        return 2 ** (len(self.config["down_block_out_channels"]) - 1)

    def moments(self, images: Tensor) -> Tensor:
        return _moments(self.module, images)

    def decode(self, raw: Tensor) -> Tensor:
        return _decode(self.module, raw)


class Flux2Adapter(ImageAutoencoder):
    """`AutoencoderKLFlux2`: normalized in 2 x 2 squares by the running statistics of a batch norm."""

    _shared = ("block_out_channels", "layers_per_block", "act_fn", "latent_channels", "norm_num_groups")
    encoder_fields = ("in_channels", "down_block_types", "use_quant_conv", "mid_block_add_attention", *_shared)
    decoder_fields = (
        "out_channels",
        "up_block_types",
        "decoder_block_out_channels",
        "use_post_quant_conv",
        "mid_block_add_attention",
        *_shared,
    )

    @property
    def downsample_factor(self) -> int:
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    @property
    def scaling(self) -> LatentScaling:
        """As `Flux2Pipeline._encode_vae_image`: (patchified - running_mean) / sqrt(running_var + batch_norm_eps)."""
        rows, columns = self.config["patch_size"]
        if rows != columns:
            raise UserError(f"the model's patch_size is {rows} x {columns}: only squares are supported")
        norm = self.module.bn
        std = torch.sqrt(norm.running_var.float() + self.config["batch_norm_eps"])
        values = {"mean": norm.running_mean.float().tolist(), "std": std.tolist()}
        return LatentScaling.from_dict({"scale": 1.0, "shift": 0.0, "patch": rows, **values})

    def moments(self, images: Tensor) -> Tensor:
        return _moments(self.module, images)

    def decode(self, raw: Tensor) -> Tensor:
        return _decode(self.module, raw)


def _moments(module: Any, images: Tensor) -> Tensor:
    """The parts themselves, since `encode` splits images and batches where its switches say so."""
    moments: Tensor = module.encoder(images)
    return moments if module.quant_conv is None else module.quant_conv(moments)


def _decode(module: Any, raw: Tensor) -> Tensor:
    images: Tensor = module.decoder(raw if module.post_quant_conv is None else module.post_quant_conv(raw))
    return images
