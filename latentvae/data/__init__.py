"""Image collections as one kind of source, and the batches that training and validation take from them."""

from latentvae.data.captions import Captions, open_captions
from latentvae.data.entries import EntryTable, ImageSource, SourceEntry
from latentvae.data.folder import FolderSource
from latentvae.data.hub_dataset import DatasetSource
from latentvae.data.listing import ListSource
from latentvae.data.parquet import ParquetSource
from latentvae.data.pipeline import (
    Batch,
    DataConfig,
    TrainingImages,
    UnreadableImages,
    split_by_key,
    training_batches,
    validation_batches,
)
from latentvae.data.python_source import PythonSource
from latentvae.data.sources import open_source
from latentvae.data.tar import TarSource

__all__ = [
    "Batch",
    "Captions",
    "DataConfig",
    "DatasetSource",
    "EntryTable",
    "FolderSource",
    "ImageSource",
    "ListSource",
    "ParquetSource",
    "PythonSource",
    "SourceEntry",
    "TarSource",
    "TrainingImages",
    "UnreadableImages",
    "open_captions",
    "open_source",
    "split_by_key",
    "training_batches",
    "validation_batches",
]
