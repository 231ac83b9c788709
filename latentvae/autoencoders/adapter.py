"""`load_autoencoder`: any supported diffusers autoencoder, from wherever it lies, under one interface."""

import os
from pathlib import Path
from typing import Any

import diffusers
from torch import nn

from latentvae.autoencoders.deterministic import DCAdapter, TinyAdapter
from latentvae.autoencoders.interface import ImageAutoencoder as ImageAutoencoder
from latentvae.autoencoders.kl import AsymmetricKLAdapter, Flux2Adapter, KLAdapter
from latentvae.autoencoders.tiny import AutoencoderTinyPool
from latentvae.autoencoders.video import QwenImageAdapter, WanAdapter
from latentvae.checkpoint import load_class
from latentvae.errors import UserError
from latentvae.model.autoencoder import AutoencoderKL, DiffusersAutoencoderKL

ADAPTERS: dict[str, type[ImageAutoencoder]] = {  # by `_class_name` in config.json
    "AutoencoderKL": KLAdapter,
    "AutoencoderKLFlux2": Flux2Adapter,
    "AsymmetricAutoencoderKL": AsymmetricKLAdapter,
    "AutoencoderTiny": TinyAdapter,
    "AutoencoderTinyPool": TinyAdapter,
    "AutoencoderDC": DCAdapter,
    "AutoencoderKLQwenImage": QwenImageAdapter,
    "AutoencoderKLWan": WanAdapter,
}


def load_autoencoder(
    source: str | os.PathLike[str] | ImageAutoencoder | nn.Module,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> ImageAutoencoder:
    """Any supported autoencoder: from a diffusers folder, a hub id, a single file (AutoencoderKL only), or in memory.

    What is loaded is in float32 and in eval mode. A model in memory is used as it is, not copied; a plain
    `diffusers.AutoencoderKL` gets our networks around its own tensors.

    Args:
        source: where it is; an `ImageAutoencoder` is given back.
        subfolder, revision, variant: as in diffusers' `from_pretrained`; for what is loaded only.

    Raises:
        UserError: an unsupported class, missing or unexpected weights, a pickle, or nothing there.
    """
    options = {"subfolder": subfolder, "revision": revision, "variant": variant}
    if isinstance(source, str | os.PathLike):
        where = source if isinstance(source, str) else Path(source)
        module = load_class(where, {name: _class_of(name) for name in ADAPTERS}, **options)
        return ADAPTERS[type(module).__name__](module, str(source))
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UserError(f"{given[0]} is for a model that is loaded, and a {type(source).__name__} in memory was given")
    if isinstance(source, ImageAutoencoder):
        return source
    for name, adapter in ADAPTERS.items():
        if isinstance(source, _class_of(name)):
            return adapter(source, _origin(source))
    if isinstance(source, DiffusersAutoencoderKL):
        return KLAdapter(AutoencoderKL.from_diffusers(source), _origin(source))
    raise UserError(f"a model of class {type(source).__name__} was given; supported are {', '.join(ADAPTERS)}")


def _class_of(name: str) -> Any:
    """Ours where we have one of that name, else diffusers'."""
    return {"AutoencoderKL": AutoencoderKL, "AutoencoderTinyPool": AutoencoderTinyPool}.get(name) or getattr(
        diffusers, name
    )


def _origin(module: Any) -> str | None:
    """The folder or hub id that diffusers loaded it from."""
    return str(module.config.get("_name_or_path") or "") or None
