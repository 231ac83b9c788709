"""The compression stage of latent diffusion: train, fine-tune and ship image VAEs, and turn datasets into latents.

The public names are imported when first used, so that `import latentvae` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentvae.checkpoint import load_model as load_model
    from latentvae.checkpoint import save_model as save_model
    from latentvae.errors import UserError as UserError
    from latentvae.export import export_model as export_model
    from latentvae.images import PixelFormat as PixelFormat
    from latentvae.latents.dataset import LatentDataset as LatentDataset
    from latentvae.latents.decode import decode_store as decode_store
    from latentvae.latents.encode import encode_dataset as encode_dataset
    from latentvae.model.autoencoder import AutoencoderKL as AutoencoderKL
    from latentvae.recipe import Recipe as Recipe
    from latentvae.recipe import build as build
    from latentvae.recipe import load_recipe as load_recipe
    from latentvae.training.trainer import Trainer as Trainer

__version__ = "0.1.0"

_HOMES = {  # public name -> the module that defines it
    "AutoencoderKL": "latentvae.model.autoencoder",
    "LatentDataset": "latentvae.latents.dataset",
    "PixelFormat": "latentvae.images",
    "Recipe": "latentvae.recipe",
    "Trainer": "latentvae.training.trainer",
    "UserError": "latentvae.errors",
    "build": "latentvae.recipe",
    "decode_store": "latentvae.latents.decode",
    "encode_dataset": "latentvae.latents.encode",
    "export_model": "latentvae.export",
    "load_model": "latentvae.checkpoint",
    "load_recipe": "latentvae.recipe",
    "save_model": "latentvae.checkpoint",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'latentvae' has no attribute {name!r}; public names: {', '.join(_HOMES)}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
