"""The autoencoders whose encoder gives latents and no posterior: AutoencoderTiny (TAESD), AutoencoderDC (SANA)."""

from torch import Tensor

from latentvae.autoencoders.interface import ImageAutoencoder


class DeterministicAdapter(ImageAutoencoder):
    """Encoder and decoder alone, without a convolution between them."""

    has_posterior = False

    def moments(self, images: Tensor) -> Tensor:
        latents: Tensor = self.module.encoder(images)
        return latents

    def decode(self, raw: Tensor) -> Tensor:
        images: Tensor = self.module.decoder(raw)
        return images


class TinyAdapter(DeterministicAdapter):
    """`AutoencoderTiny`: its networks work in [0, 1], and diffusers' class maps from and to [-1, 1]."""

    encoder_fields = ("in_channels", "latent_channels", "act_fn", "encoder_block_out_channels", "num_encoder_blocks")
    decoder_fields = (
        "out_channels",
        "latent_channels",
        "act_fn",
        "decoder_block_out_channels",
        "num_decoder_blocks",
        "upsample_fn",
        "upsampling_scaling_factor",
    )

    @property
    def downsample_factor(self) -> int:
        return 2 ** (len(self.config["num_encoder_blocks"]) - 1)  # every stage but the first begins with a stride of 2


class DCAdapter(DeterministicAdapter):
    """`AutoencoderDC`, the deep compression autoencoder."""

    _shared = ("in_channels", "latent_channels", "attention_head_dim")
    encoder_fields = (
        "encoder_block_types",
        "encoder_block_out_channels",
        "encoder_layers_per_block",
        "encoder_qkv_multiscales",
        "downsample_block_type",
        "encoder_out_shortcut",
        *_shared,
    )
    decoder_fields = (
        "decoder_block_types",
        "decoder_block_out_channels",
        "decoder_layers_per_block",
        "decoder_qkv_multiscales",
        "upsample_block_type",
        "decoder_norm_types",
        "decoder_act_fns",
        "decoder_in_shortcut",
        "decoder_conv_act_fn",
        *_shared,
    )

    @property
    def downsample_factor(self) -> int:
        return 2 ** (len(self.config["encoder_block_out_channels"]) - 1)
