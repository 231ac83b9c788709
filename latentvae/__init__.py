"""The compression stage of latent diffusion: train, fine-tune and ship image VAEs, and turn datasets into latents.

The public names are imported when first used, so that `import latentvae` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentvae.assembly import build as build
    from latentvae.autoencoders.adapter import load_autoencoder as load_autoencoder
    from latentvae.checkpoint import load_model as load_model
    from latentvae.checkpoint import save_model as save_model
    from latentvae.convert import convert_model as convert_model
    from latentvae.data.captions import open_captions as open_captions
    from latentvae.data.sources import open_source as open_source
    from latentvae.errors import UserError as UserError
    from latentvae.export import export_model as export_model
    from latentvae.export import export_single_file as export_single_file
    from latentvae.images import PixelFormat as PixelFormat
    from latentvae.latents.encoding.encode import encode_dataset as encode_dataset
    from latentvae.latents.operating.decode import decode_store as decode_store
    from latentvae.latents.operating.hand_over import export_store as export_store
    from latentvae.latents.operating.statistics import store_statistics as store_statistics
    from latentvae.latents.operating.verify import verify_store as verify_store
    from latentvae.latents.reading.dataset import LatentDataset as LatentDataset
    from latentvae.latents.reading.iterable import LatentIterableDataset as LatentIterableDataset
    from latentvae.latents.reading.mixing import MixedLatentDataset as MixedLatentDataset
    from latentvae.latents.reading.sampler import BucketBatchSampler as BucketBatchSampler
    from latentvae.model.autoencoder import AutoencoderKL as AutoencoderKL
    from latentvae.recipe import Recipe as Recipe
    from latentvae.recipe import load_recipe as load_recipe
    from latentvae.training.trainer import Trainer as Trainer

__version__ = "0.1.0"

_HOMES = {  # public name -> the module that defines it
    "AutoencoderKL": "latentvae.model.autoencoder",
    "BucketBatchSampler": "latentvae.latents.reading.sampler",
    "LatentDataset": "latentvae.latents.reading.dataset",
    "LatentIterableDataset": "latentvae.latents.reading.iterable",
    "MixedLatentDataset": "latentvae.latents.reading.mixing",
    "PixelFormat": "latentvae.images",
    "Recipe": "latentvae.recipe",
    "Trainer": "latentvae.training.trainer",
    "UserError": "latentvae.errors",
    "build": "latentvae.assembly",
    "convert_model": "latentvae.convert",
    "decode_store": "latentvae.latents.operating.decode",
    "encode_dataset": "latentvae.latents.encoding.encode",
    "export_model": "latentvae.export",
    "export_single_file": "latentvae.export",
    "export_store": "latentvae.latents.operating.hand_over",
    "load_autoencoder": "latentvae.autoencoders.adapter",
    "load_model": "latentvae.checkpoint",
    "load_recipe": "latentvae.recipe",
    "open_captions": "latentvae.data.captions",
    "open_source": "latentvae.data.sources",
    "save_model": "latentvae.checkpoint",
    "store_statistics": "latentvae.latents.operating.statistics",
    "verify_store": "latentvae.latents.operating.verify",
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
