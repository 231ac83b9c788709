"""A tiny model and stores made with it; `python -m tests.latents.stores SOURCE OUT` encodes slowly, to be killed."""

import sys
import time
from pathlib import Path

import torch

from latentvae.latents.encode import EncodeReport, encode_dataset
from latentvae.model.autoencoder import AutoencoderKL

SETTINGS = {"resolution": 32, "unit_images": 3, "batch_size": 2, "num_workers": 0, "progress": False}


def tiny_vae(*, channels=3, seed=0, **overrides):
    """Two levels (f2), 2 latent channels: encodes a 32 px image in about a millisecond."""
    torch.manual_seed(seed)
    shape = {
        "in_channels": channels,
        "out_channels": channels,
        "latent_channels": 2,
        "block_out_channels": [8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 2,
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
    }
    return AutoencoderKL.from_preset("f8c4-tiny", **(shape | overrides)).eval()


class Photographs:
    """A Python source of the images of a folder that takes its time over each."""

    def __init__(self, folder, seconds=0.0):
        self.paths = sorted(path for path in Path(folder).rglob("*.*") if path.is_file())
        self.folder, self.seconds = Path(folder), seconds

    def keys(self):
        return [path.relative_to(self.folder).as_posix() for path in self.paths]

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return {"key": self.keys()[index], "image": self.paths[index]}


def encode_photographs(folder, out, *, seconds=0.0, vae=None, **options) -> EncodeReport:
    return encode_dataset(Photographs(folder, seconds), vae or tiny_vae(), out, **(SETTINGS | options))


def contents(folder):
    """Relative path -> bytes of every file."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def committed(folder):
    """Commit record -> (inode, mtime) of it and of the files it vouches for."""
    found = {}
    for record in sorted(folder.glob("shards/*/*.json")):
        files = [record, record.with_suffix(".parquet"), record.with_suffix(".safetensors")]
        found[record.name] = [(file.stat().st_ino, file.stat().st_mtime_ns) for file in files]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    encode_photographs(sys.argv[1], sys.argv[2], seconds=0.1)
