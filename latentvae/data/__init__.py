"""Image collections as one kind of source, and the batches that training and validation take from them."""

from latentvae.data.pipeline import (
    Batch,
    DataConfig,
    TrainingImages,
    UnreadableImages,
    split_by_key,
    training_batches,
    validation_batches,
)
from latentvae.data.sources import FolderSource, ImageSource, PythonSource, SourceEntry, open_source

__all__ = [
    "Batch",
    "DataConfig",
    "FolderSource",
    "ImageSource",
    "PythonSource",
    "SourceEntry",
    "TrainingImages",
    "UnreadableImages",
    "open_source",
    "split_by_key",
    "training_batches",
    "validation_batches",
]
