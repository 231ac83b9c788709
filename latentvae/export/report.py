"""What was shipped, as exports report it."""

from dataclasses import dataclass
from pathlib import Path

from latentvae.checkpoint import ModelHashes


@dataclass(frozen=True)
class ExportReport:
    """A diffusers folder that was shipped. Differences are |a - b| / |b| over the whole check batch."""

    folder: Path
    dtype: str
    num_parameters: int
    num_bytes: int  # of the weights file
    hashes: ModelHashes  # of the exported weights
    moments_difference: float  # plain diffusers on the exported folder against our network, same weights
    reconstruction_difference: float
    rounding_difference: float  # reconstructions of the exported weights against the unrounded model's; 0 in fp32
    checked_on: str  # which images


@dataclass(frozen=True)
class SingleFileReport:
    """A single file that was shipped. Differences are |a - b| / |b| over the whole check batch."""

    file: Path
    dtype: str  # of the autoencoder's weights; "fp16, fp32" where the checkpoint has them mixed
    num_tensors: int  # of the autoencoder
    num_parameters: int
    num_bytes: int  # of the whole file
    moments_difference: float  # plain diffusers on the file against our network, same weights
    reconstruction_difference: float
    rounding_difference: float  # reconstructions of the exported weights against the unrounded model's
    checked_on: str  # which images
    warnings: tuple[str, ...]  # how loaders may misuse the file
    notes: tuple[str, ...]
