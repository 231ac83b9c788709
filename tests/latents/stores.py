"""A tiny model, small pictures, and encoding in processes of their own, which tests kill and freeze."""

import multiprocessing
import os
import shutil
import sys
import tarfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from latentvae.errors import UserError
from latentvae.latents.encoding.encode import encode_dataset
from latentvae.latents.store.files import LatentStore, open_shard
from latentvae.latents.store.plan import Plan
from latentvae.model.autoencoder import AutoencoderKL

COUNT = 60  # pictures of the tests with several processes, in 20 units of SETTINGS
SETTINGS = {"resolution": 32, "unit_images": 3, "batch_size": 2, "num_workers": 0, "progress": False}
FORK_SERVER = multiprocessing.get_context("forkserver" if os.name != "nt" else "spawn")
FORK_SERVER.set_forkserver_preload(["tests.latents.stores"])  # a new process then takes no seconds of imports


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


class Slow:
    """A Python source of the images of a folder that takes its time over each, and dies over those named."""

    def __init__(self, folder, seconds=0.0, deadly=()):
        self.folder, self.seconds, self.deadly = Path(folder), seconds, deadly
        self.paths = sorted(path for path in self.folder.rglob("*.*") if path.is_file())

    def keys(self):
        return [path.relative_to(self.folder).as_posix() for path in self.paths]

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        time.sleep(self.seconds)
        key = self.paths[index].relative_to(self.folder).as_posix()
        if key in self.deadly:
            os.kill(os.getpid(), 9)
        return {"key": key, "image": self.paths[index]}


def three_squares():
    """A Python source to be named by a string."""
    return [{"key": f"{index}", "image": np.full((40, 40, 3), 100 * index, np.uint8)} for index in range(3)]


def write_pictures(folder, count, *, first=0, sides=((48, 40), (40, 48), (44, 44))):
    """Small JPEG files, each with a content of its own, in a few subfolders."""
    for number in range(first, first + count):
        generator = np.random.default_rng(number)
        blocks = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        path = Path(folder) / f"part_{number % 7}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(blocks).resize(sides[number % len(sides)], Image.Resampling.BICUBIC).save(path, quality=90)


def pack(folder, tar, contents=None):
    """The files of a folder as a tar, in the order of their names; `contents` (name -> bytes) win over them."""
    with tarfile.open(tar, "w") as archive:
        for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            replaced = Path(f"{tar}.member")
            replaced.write_bytes((contents or {}).get(name) or path.read_bytes())
            archive.add(replaced, name)
            replaced.unlink()


def run(source, out, options):
    """What a process of its own does; a UserError goes to the standard error as the last line, and the exit is 2."""
    torch.set_num_threads(1)
    try:
        encode_dataset(source, tiny_vae(), out, **(SETTINGS | options))
    except UserError as error:
        os.write(2, f"error: {error}\n".encode())
        os._exit(2)


def start(source, out, *, prepare=None, target=run, **options) -> BaseProcess:
    """Begin to encode in a process of its own; `prepare` is called there first. Returns when it has begun."""
    has_begun, says = FORK_SERVER.Pipe(duplex=False)
    process = FORK_SERVER.Process(target=_prepared, args=(says, prepare, target, source, out, options))
    process.start()
    has_begun.recv()
    return process


def _prepared(says, prepare, target, *arguments):
    if os.name != "nt":
        multiprocessing.set_start_method("fork", force=True)  # as it is where nothing was said: not the test's own
    if prepare is not None:
        prepare()
    says.send(None)
    target(*arguments)


def contents(folder):
    """Relative path -> bytes of every file."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def identities(folder):
    """Relative path -> (inode, mtime) of every file: a file that was written again has others."""
    found = ((path, path.stat()) for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): (status.st_ino, status.st_mtime_ns) for path, status in found}


def records_of(folder):
    """Unit -> commit record, of those that are done."""
    store = LatentStore(folder)
    found = {unit.number: store.read_record(unit.bucket, unit.number) for unit in Plan(store.plan_folder).units}
    return {number: record for number, record in found.items() if record is not None}


def rows_of(folder):
    """Key -> index row, of all committed units; a key in two rows fails."""
    store, rows = LatentStore(folder), {}
    for record in records_of(folder).values():
        for row in store.read_unit_index(record).to_pylist():
            assert row["key"] not in rows, f"{row['key']} is in two rows"
            rows[row["key"]] = row
    return rows


def latents_of(folder):
    """Key -> tensors of an image's latents."""
    store, latents = LatentStore(folder), {}
    for record in records_of(folder).values():
        shards = {bucket: open_shard(store.folder / path).tensors for bucket, path in record.shards.items()}
        for row in store.read_unit_index(record).to_pylist():
            if row["row"] >= 0:
                latents[row["key"]] = {name: values[row["row"]] for name, values in shards[row["bucket"]].items()}
    return latents


def copy_of(folder, name):
    """A copy of a store beside it."""
    return Path(shutil.copytree(folder, folder.with_name(name)))


if __name__ == "__main__":  # SOURCE OUT SECONDS, for torchrun
    run(Slow(sys.argv[1], float(sys.argv[3])), sys.argv[2], {})
