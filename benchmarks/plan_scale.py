"""What planning costs for very many images: seconds, peak memory and bytes on disk, of the plan alone.

    python benchmarks/plan_scale.py --keys 100000 1000000

For each number of keys, and for a source like a folder (files of their own, in hash order) and one like tar shards
(members with offsets, in their order), processes of their own do one after the other:

    plan      compare with the empty plan, cut units, write the plan to disk
    resume    compare the plan on disk with the same entries: what a second `latentvae encode` does
    join      open the plan and read the images of every 100th unit: what another process of a launch does

The entries come without files, so that listing and header reading, which are the disk's speed, are not in it; making
them up is in the memory, not in the time. Printed besides: what a key more takes, from the first number of keys to each
further one, and what 100 million would need if it went on so.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from latentvae.data.entries import EntryTable
from latentvae.images import DecodePolicy
from latentvae.latents.encoding.growth import compare, plan_new_images
from latentvae.latents.store.buckets import square_rule
from latentvae.latents.store.plan import Plan, publish
from latentvae.latents.store.records import Manifest, VAERecord

PER_TAR = 10_000  # members of a shard, as img2dataset writes them
MANY = 100_000_000
STEPS = ("plan", "resume", "join")


def entries_of(kind: str, count: int) -> EntryTable:
    """Keys of about 40 characters, as real ones are."""
    numbers = np.arange(count)
    if kind == "folder":
        names = pa.array([f"photographs/{n % 1000:03d}/photograph-{n:012d}.jpg" for n in range(count)])
        uris = pa.array([f"/data/{name}" for name in names.to_pylist()])
        return EntryTable.from_columns(names, uris, num_bytes=100_000 + numbers, mtime_ns=1_700_000_000_000_000_000)
    names = pa.array([f"shard-{n // PER_TAR:06d}.tar/{n % PER_TAR:09d}-{n:012d}.jpg" for n in range(count)])
    shards = [f"s3://bucket/shards/shard-{n:06d}.tar" for n in range(-(-count // PER_TAR))]
    uris = pa.DictionaryArray.from_arrays(pa.array(numbers // PER_TAR, pa.int32()), pa.array(shards)).cast(pa.string())
    offsets = 512 + (numbers % PER_TAR) * 102_400
    return EntryTable.from_columns(names, uris, offset=offsets, num_bytes=100_000 + numbers, mtime_ns=1)


def manifest() -> Manifest:
    """Of a store of f8c4 latents at 256 pixels."""
    vae = VAERecord(name=None, class_name="AutoencoderKL", encoder="", decoders=[""], config={}, scaling={})
    return Manifest(
        fingerprint="", fields={}, store="moments", dtype="fp16", hflip=False, latent_channels=4,
        buckets=list(square_rule(256, 8, 8, "skip").buckets), vae=vae, source="",
    )  # fmt: skip


def step(name: str, kind: str, count: int, folder: Path) -> None:
    """One step, in this process: prints its seconds, and its peak memory with and without the entries."""
    entries = entries_of(kind, count) if name != "join" else None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    plan = Plan(folder)
    if name == "plan":
        assert entries is not None
        growth = compare(plan, entries)
        table = plan_new_images(
            growth.new, manifest(), square_rule(256, 8, 8, "skip"), DecodePolicy(), first_unit=0, unit_images=1024,
            is_sequential=kind == "tar",
        )  # fmt: skip
        publish(folder, table)
        plan.refresh()
    elif name == "resume":
        assert entries is not None
        growth = compare(plan, entries)
        if len(growth.new) or len(growth.moved) or growth.num_common != count:
            raise SystemExit("the plan does not hold the entries it was made of")
    else:
        read = sum(len(plan.images(unit.number)) for unit in plan.units[::100])
        if not read or plan.num_images != count:
            raise SystemExit("the plan does not hold all images")
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{seconds} {peak * 1024} {before * 1024} {entries.table.nbytes if entries is not None else 0}")


def main() -> None:
    """Run every step in a process of its own and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--step", nargs=4, metavar=("STEP", "KIND", "KEYS", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        name, kind, keys, path = given.step
        step(name, kind, int(keys), Path(path))
        return
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"torch {torch.__version__}, pyarrow {pa.__version__}; an idle process has {idle / 1e6:.0f} MB")
    first: dict[tuple[str, str], tuple[int, float]] = {}  # kind, step -> keys and peak of the first run
    for kind in ("folder", "tar"):
        for count in given.keys:
            with tempfile.TemporaryDirectory() as folder:
                for name in STEPS:
                    command = [sys.executable, __file__, "--step", name, kind, str(count), folder]
                    result = subprocess.run(command, check=True, capture_output=True, text=True)
                    seconds, peak, before, key_list = map(float, result.stdout.split())
                    print(
                        f"{kind:<7} {count:>11,} keys  {name:<7} {seconds:7.2f} s  peak {peak / 1e6:6.0f} MB "
                        f"({before / 1e6:.0f} MB before, entries {key_list / 1e6:.0f} MB)",
                        flush=True,
                    )
                    smaller = first.setdefault((kind, name), (count, peak))
                    if count > smaller[0]:
                        per_key = (peak - smaller[1]) / (count - smaller[0])
                        memory, minutes = peak + per_key * (MANY - count), seconds / count * MANY / 60
                        print(
                            f"{'':<28}{per_key:.0f} bytes of memory and {seconds / count * 1e6:.1f} us a key more; "
                            f"{MANY:,} keys: {memory / 1e9:.0f} GB, {minutes:.0f} min",
                            flush=True,
                        )
                size = sum(path.stat().st_size for path in Path(folder).iterdir())
                print(f"{'':<28}plan on disk {size / 1e6:.1f} MB, {size / count:.1f} bytes a key", flush=True)


if __name__ == "__main__":
    main()
