"""Video autoencoders on single frames: AutoencoderKLQwenImage, AutoencoderKLWan. Sequences of frames are refused."""

from typing import Any

from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from torch import Tensor

from latentvae.autoencoders.interface import ImageAutoencoder
from latentvae.errors import UserError
from latentvae.model.scaling import LatentScaling


class FrameAdapter(ImageAutoencoder):
    """A causal video model: the first frame is encoded by itself, as an image.

    The caches that carry features from frame to frame are left out: a single frame has nothing before or after it.
    """

    _shared = ("base_dim", "z_dim", "dim_mult", "num_res_blocks", "attn_scales", "temperal_downsample")

    @property
    def latent_channels(self) -> int:
        return int(self.config["z_dim"])

    @property
    def downsample_factor(self) -> int:
        return 2 ** (len(self.config["dim_mult"]) - 1)

    @property
    def scaling(self) -> LatentScaling:
        """As the pipelines: (raw - latents_mean) / latents_std, per channel."""
        statistics = {key: self.config[key] for key in ("latents_mean", "latents_std")}
        return LatentScaling.from_config({"scaling_factor": 1.0, "latent_channels": self.latent_channels, **statistics})

    def moments(self, images: Tensor) -> Tensor:
        _refuse_frames("images", images)
        frames = self._before(images[:, :, None])  # (B, C, 1, H, W)
        moments: Tensor = self.module.quant_conv(self.module.encoder(frames))  # (B, 2D, 1, h, w)
        return moments.squeeze(2)

    def decode(self, raw: Tensor) -> Tensor:
        _refuse_frames("latents", raw)
        frames = self._decoded(self.module.post_quant_conv(raw[:, :, None]))  # (B, C, 1, H, W)
        return frames.squeeze(2)

    def _before(self, frames: Tensor) -> Tensor:
        return frames

    def _decoded(self, latents: Tensor) -> Tensor:
        frames: Tensor = self.module.decoder(latents)
        return frames


class QwenImageAdapter(FrameAdapter):
    """`AutoencoderKLQwenImage`."""

    encoder_fields = ("input_channels", *FrameAdapter._shared)
    decoder_fields = encoder_fields

    @property
    def in_channels(self) -> int:
        return int(self.config["input_channels"])


class WanAdapter(FrameAdapter):
    """`AutoencoderKLWan`: with `patch_size` (Wan 2.2) squares of pixels become channels before the encoder."""

    encoder_fields = ("in_channels", "patch_size", "is_residual", *FrameAdapter._shared)
    decoder_fields = ("out_channels", "patch_size", "is_residual", "decoder_base_dim", *FrameAdapter._shared)

    @property
    def _patch(self) -> int:
        return int(self.config["patch_size"] or 1)

    @property
    def in_channels(self) -> int:
        return int(self.config["in_channels"]) // self._patch**2

    @property
    def downsample_factor(self) -> int:
        return super().downsample_factor * self._patch

    def _before(self, frames: Tensor) -> Tensor:
        patches: Tensor = patchify(frames, self._patch)
        return patches

    def _decoded(self, latents: Tensor) -> Tensor:
        options: dict[str, Any] = {"first_chunk": True}
        frames: Tensor = unpatchify(self.module.decoder(latents, **options), self._patch)
        return frames


def _refuse_frames(what: str, tensor: Tensor) -> None:
    if tensor.ndim != 4:
        raise UserError(
            f"{what} have shape {tuple(tensor.shape)}: a video autoencoder is used on single frames, (B, channels, "
            "height, width); give every frame as an image of its own"
        )
