"""What the manifest of a store names, made again: its autoencoder, its settings, its sizes of images."""

from pathlib import Path
from typing import Any

from latentvae.autoencoders.adapter import ImageAutoencoder, load_autoencoder
from latentvae.errors import UserError, one_line
from latentvae.images import DecodePolicy, PixelFormat
from latentvae.latents.encoding.settings import EncodeConfig, fingerprint_fields, rule_of
from latentvae.latents.store.fingerprint import require_same
from latentvae.latents.store.records import Manifest


def recorded_autoencoder(manifest: Manifest, where: str | Path, vae: Any = None) -> ImageAutoencoder:
    """`vae`, or the one that the store names. UserError where that one is not there any more, or its latents misfit."""
    name = manifest.vae.name
    if vae is not None:
        model = load_autoencoder(vae)
    elif name is None:
        raise UserError(f"{where} does not name a VAE that could be loaded: pass --vae")
    else:
        try:
            model = load_autoencoder(name, **manifest.vae.load_options)
        except UserError as error:
            raise UserError(
                f"{where} was made with the VAE {name}, which does not load here: {error}; pass --vae"
            ) from error
    if model.latent_channels != manifest.latent_channels:
        raise UserError(
            f"{where} has {manifest.latent_channels} latent channels, the VAE {model.latent_channels}: pass the --vae "
            "that made it"
        )
    return model


def require_encoder(encoder: str, where: str | Path, vae: ImageAutoencoder) -> None:
    """UserError where another encoder made the store."""
    there, here = {"encoder": encoder}, {"encoder": vae.encoder_hash}
    require_same(there, here, str(where), "pass the VAE that made it")


def recorded_pixels(manifest: Manifest) -> PixelFormat:
    """Format of the images that were encoded."""
    return PixelFormat.model_validate(manifest.fields["pixels"])


def recorded_config(manifest: Manifest, where: str | Path, vae: ImageAutoencoder) -> EncodeConfig:
    """Settings that give the store's fingerprint again; UserError where they cannot be told from the manifest."""
    try:
        config, pixels = _config(manifest), recorded_pixels(manifest)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{where} has settings that this version of latentvae does not know: {one_line(error)}"
        ) from error
    rule = rule_of(config, vae)
    again = fingerprint_fields(config, manifest.store, vae.encoder_hash, rule, pixels)
    require_same(
        manifest.fields, again, str(where), "this version of latentvae cannot encode as that store was encoded"
    )
    return config


def _config(manifest: Manifest) -> EncodeConfig:
    fields = manifest.fields
    width, _, height = str(fields["buckets"]).partition("x")
    is_square = width.isdecimal() and width == height
    return EncodeConfig(
        resolution=int(width) if is_square else None,
        buckets=None if is_square else fields["buckets"],
        filter=fields["filter"],
        small=fields["small"],
        policy=DecodePolicy.model_validate(fields["policy"]),
        pixels=recorded_pixels(manifest),
        store=manifest.store,
        dtype=manifest.dtype,
        hflip=manifest.hflip,
        precision=fields["precision"],
        seed=fields["seed"] or 0,
    )
