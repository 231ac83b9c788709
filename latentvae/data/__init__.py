"""Image collections as one kind of source, and the batches that training and validation take from them."""

from latentvae.data.aspect import AspectBuckets, image_sizes
from latentvae.data.captions import Captions, open_captions
from latentvae.data.curriculum import Stage
from latentvae.data.entries import EntryTable, ImageSource, SourceEntry
from latentvae.data.folder import FolderSource
from latentvae.data.hub_dataset import DatasetSource
from latentvae.data.listing import ListSource
from latentvae.data.mixture import MixtureSource, SourceConfig
from latentvae.data.parquet import ParquetSource
from latentvae.data.pipeline import (
    Batch,
    DataConfig,
    TrainingImages,
    UnreadableImages,
    split_by_key,
    training_batches,
    validation_batches,
    validation_indices,
)
from latentvae.data.python_source import PythonSource
from latentvae.data.sources import open_source
from latentvae.data.summary import plan_summary
from latentvae.data.tar import TarSource

__all__ = [
    "AspectBuckets",
    "Batch",
    "Captions",
    "DataConfig",
    "DatasetSource",
    "EntryTable",
    "FolderSource",
    "ImageSource",
    "ListSource",
    "MixtureSource",
    "ParquetSource",
    "PythonSource",
    "SourceConfig",
    "SourceEntry",
    "Stage",
    "TarSource",
    "TrainingImages",
    "UnreadableImages",
    "image_sizes",
    "open_captions",
    "open_source",
    "plan_summary",
    "split_by_key",
    "training_batches",
    "validation_batches",
    "validation_indices",
]
