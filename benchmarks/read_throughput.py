"""Latents read from a store beside a folder of .npz files and WebDataset: items per second, warm cache, random order.

    python benchmarks/read_throughput.py

Items are float32 latents of 16 KiB (4 x 32 x 32) and of 256 KiB (4 x 128 x 128). `mode`: the store's mean against one
.npz of float32 latents per image, as most caches keep them. `sample`: a fresh sample from the store's moments against
an .npz of float32 mean and logvar that also samples, with one NumPy generator for all. The store is fp16, and its items
come normalized and with sizes. WebDataset reads .npy members through a shuffle buffer: a tar has no random access.

The contestants read alternately; printed are medians over the rounds and their ratios. `read`: one process and
thread, as a DataLoader's worker has, without collation. `loader`: DataLoader with two workers and its own collation.
"""

import argparse
import io
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset

from latentvae.latents.reading.dataset import LatentDataset
from latentvae.latents.store.files import LatentStore, UnitContent, file_record, write_unit
from latentvae.latents.store.fingerprint import fingerprint
from latentvae.latents.store.plan import PLAN, publish
from latentvae.latents.store.records import Bucket, IndexRow, Manifest, VAERecord
from latentvae.model.scaling import LatentScaling

CHANNELS = 4
FACTOR = 8  # pixels per latent position
UNIT = 256  # items per shard
BATCH = 64


def moments(index: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and logvar of an item, (4, side, side) float32."""
    generator = np.random.default_rng(index)
    mean = generator.standard_normal((CHANNELS, side, side), dtype=np.float32)
    return mean, generator.standard_normal(mean.shape, dtype=np.float32) * 0.3 - 2


def write_latents(folder: Path, count: int, side: int) -> None:
    """The same items in every layout."""
    bucket = Bucket(width=side * FACTOR, height=side * FACTOR, latent_width=side, latent_height=side)
    fields: dict[str, Any] = {"benchmark": side}
    scaling = LatentScaling(scale=0.13025)
    vae = VAERecord(
        name=None, class_name="AutoencoderKL", encoder="", decoders=[""], config={}, scaling=scaling.to_dict()
    )
    manifest = Manifest(
        fingerprint=fingerprint(fields), fields=fields, store="moments", dtype="fp16", hflip=False,
        latent_channels=CHANNELS, buckets=[bucket], vae=vae, source="made up",
    )  # fmt: skip
    store = LatentStore(folder / "store")
    planned = []
    for name in ("npz", "moments", "tar"):
        (folder / name).mkdir()
    for start in range(0, count, UNIT):
        numbers = range(start, min(start + UNIT, count))
        made = [moments(number, side) for number in numbers]
        with tarfile.open(folder / "tar" / f"{start:06d}.tar", "w") as tar:
            for number, (mean, logvar) in zip(numbers, made, strict=True):
                np.savez(folder / "npz" / f"{number:06d}.npz", latents=mean)
                np.savez(folder / "moments" / f"{number:06d}.npz", mean=mean, logvar=logvar)
                stream = io.BytesIO()
                np.save(stream, mean)
                member = tarfile.TarInfo(f"{number:06d}.npy")
                member.size = len(stream.getvalue())
                tar.addfile(member, io.BytesIO(stream.getvalue()))
        tensors = {
            "mean": torch.from_numpy(np.stack([mean for mean, _ in made])).half(),
            "logvar": torch.from_numpy(np.stack([logvar for _, logvar in made])).half(),
        }
        size = bucket.width
        rows = [
            IndexRow(
                key=f"{number:06d}.png", row=row, status="ok", width=size, height=size, scaled_width=size,
                scaled_height=size, crop_top=0, crop_left=0, bucket=bucket.name,
            )
            for row, number in enumerate(numbers)
        ]  # fmt: skip
        unit = start // UNIT
        write_unit(
            store, manifest, UnitContent(unit, bucket.name, {bucket.name: tensors}, rows), {}, owner="b"
        ).publish()
        planned += [(unit, row.row, row.key, row.key, None, size, size, bucket.name, 1, 1) for row in rows]
    columns = zip(*planned, strict=True)
    table = pa.table([pa.array(column, kind.type) for column, kind in zip(columns, PLAN, strict=True)], schema=PLAN)
    path = publish(store.plan_folder, table)
    store.write_manifest(manifest.model_copy(update={"complete": True, "plan": {path.name: file_record(path)}}))


class Npz(Dataset[dict[str, Any]]):
    """A folder of .npz as trainers read it."""

    def __init__(self, folder: Path, *, sample: bool) -> None:
        self.files = sorted(folder.glob("*.npz"))
        self.sample = sample
        self.generator = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.files[index]
        with np.load(path) as file:
            if not self.sample:
                return {"latents": torch.from_numpy(file["latents"]), "key": path.stem}
            mean, logvar = file["mean"], file["logvar"]
        noise = self.generator.standard_normal(mean.shape, dtype=np.float32)
        return {"latents": torch.from_numpy(mean + np.exp(0.5 * logvar) * noise), "key": path.stem}


def read_all(dataset: Any, order: list[int]) -> int:
    """Batch by batch, without collation."""
    fetch = getattr(dataset, "__getitems__", lambda places: [dataset[place] for place in places])
    return sum(len(fetch(order[start : start + BATCH])) for start in range(0, len(order), BATCH))


def load_all(dataset: Any, order: list[int]) -> int:
    """Through a DataLoader with two workers."""
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    return sum(len(batch["latents"]) for batch in DataLoader(dataset, batch_sampler=batches, num_workers=2))


def web_dataset(folder: Path, *, workers: int) -> Callable[[list[int]], int]:
    """Sequential reading of tars with a shuffle buffer. Raises ImportError where webdataset is not installed."""
    import webdataset

    shards = sorted(str(path) for path in (folder / "tar").glob("*.tar"))

    def run(order: list[int]) -> int:
        dataset = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0, empty_check=False)
        items = dataset.shuffle(1000).decode().to_tuple("npy", "__key__")
        if not workers:
            return sum(1 for _ in items)
        loader = DataLoader(items.batched(BATCH), batch_size=None, num_workers=workers)
        return sum(len(latents) for latents, _ in loader)

    return run


def measure(contestants: dict[str, Callable[[list[int]], int]], count: int, rounds: int) -> dict[str, float]:
    """Median items per second of each, reading alternately; the first round only warms the cache."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        order = np.random.default_rng(turn).permutation(count).tolist()
        for name, run in contestants.items():
            began = time.perf_counter()
            if run(order) != count:
                raise RuntimeError(f"{name} did not give every item")
            if turn:
                rates[name].append(count / (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in rates.items()}


def main() -> None:
    """Write the items, read them in turn, print rates and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scratch", type=Path, help="a folder with 2 GB free; None: the system's temporary folder")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, NumPy {np.__version__}, {given.rounds} rounds")
    for side, count in ((32, 4096), (128, 768)):
        with tempfile.TemporaryDirectory(dir=given.scratch) as name:
            folder = Path(name)
            write_latents(folder, count, side)
            mode, sample = (LatentDataset(folder / "store", posterior=kind) for kind in ("mode", "sample"))
            npz, both = Npz(folder / "npz", sample=False), Npz(folder / "moments", sample=True)
            for how, run, workers in (("read", read_all, 0), ("loader", load_all, 2)):
                contestants: dict[str, Callable[[list[int]], int]] = {
                    "mode": lambda order, run=run, mode=mode: run(mode, order),
                    ".npz": lambda order, run=run, npz=npz: run(npz, order),
                    "sample": lambda order, run=run, sample=sample: run(sample, order),
                    ".npz mean, logvar": lambda order, run=run, both=both: run(both, order),
                }
                try:
                    contestants["WebDataset"] = web_dataset(folder, workers=workers)
                except ImportError:
                    print("WebDataset is not measured: pip install webdataset")
                rates = measure(contestants, count, given.rounds)
                text = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
                print(f"{CHANNELS * side * side * 4 // 1024:>3} KiB {how:<6} items/s: {text}", flush=True)
                of_mode, of_sample = rates["mode"] / rates[".npz"], rates["sample"] / rates[".npz mean, logvar"]
                print(f"        {how:<6} mode {of_mode:.1f}x .npz, sample {of_sample:.1f}x .npz of mean and logvar")


if __name__ == "__main__":
    main()
