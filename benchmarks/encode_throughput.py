"""JPEG files to a committed latent store: our images/s beside the bare encoder, and beside plain loops over diffusers.

    python benchmarks/encode_throughput.py --source ../shared/data/caltech101 --images 32 --rounds 3

One network (same weights), the same images and the same batch size. In turn, several rounds in one run:

    bare       our encoder alone, on batches that lie decoded in memory: what end to end can reach at best
    ours       `encode_dataset`: list, plan, read, decode, resize, encode, round, hash, fsync, commit
    (a)        a loop over diffusers.AutoencoderKL at its defaults: Pillow, torchvision, float32, one .npz an image
    (b)        the same loop in bf16 and channels-last

`ours` and `bare` run in each precision of --precision. Printed: images/s of every round, the medians, and the ratios
of the medians. Without the folder of --source, JPEG files of 500x375 pixels are made up.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import diffusers
import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from latentvae.autoencoders.adapter import load_autoencoder
from latentvae.data.sources import open_source
from latentvae.images import DecodePolicy, PixelFormat, to_model
from latentvae.latents.encoding.encode import encode_dataset
from latentvae.latents.encoding.encoder import LatentEncoder, Precision
from latentvae.latents.encoding.preprocess import UnitImages
from latentvae.latents.store.buckets import square_rule
from latentvae.latents.store.plan import PlannedImage
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.model.presets import preset_config


def made_up(folder: Path, count: int) -> None:
    """JPEG files whose decoding takes about as long as that of photographs."""
    generator = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.int16)
        noisy = smooth + generator.integers(-12, 13, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{index:06d}.jpg", quality=90)


def copied(source: Path, folder: Path, count: int) -> int:
    """`count` JPEG files, evenly spaced over those of `source`."""
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    chosen = [files[round(place)] for place in np.linspace(0, len(files) - 1, min(count, len(files)))] if files else []
    for index, path in enumerate(chosen):
        shutil.copyfile(path, folder / f"{index:06d}.jpg")
    return len(chosen)


def decoded_batches(folder: Path, size: int, batch_size: int) -> list[torch.Tensor]:
    """What the encoder gets, (B, C, H, W) in [-1, 1]."""
    source = open_source(folder)
    images = UnitImages(source, square_rule(size, 8, 8, "upscale"), DecodePolicy(), "bicubic")
    planned = [
        PlannedImage(0, row, entry.key, entry.uri, None, None, None, "", entry.num_bytes, entry.mtime_ns)
        for row, entry in enumerate(source.entries())
    ]
    arrays = [torch.from_numpy(prepared.image.copy()) for prepared in images.__getitems__(planned)]
    return [to_model(torch.stack(list(part)), PixelFormat()) for part in batched(arrays, batch_size)]


def batched(items: list, size: int) -> Iterator[list]:
    """Consecutive parts."""
    return (items[start : start + size] for start in range(0, len(items), size))


@torch.no_grad()
def plain_loop(vae: diffusers.AutoencoderKL, folder: Path, out: Path, size: int, batch_size: int, fast: bool) -> None:
    """What a user writes in ten minutes; `fast`: bf16 and channels-last."""
    out.mkdir()
    cut = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
    prepare = transforms.Compose([*cut, transforms.Normalize([0.5] * 3, [0.5] * 3)])
    for part in batched(sorted(folder.iterdir()), batch_size):
        images = torch.stack([prepare(Image.open(path).convert("RGB")) for path in part])
        if fast:
            images = images.to(torch.bfloat16, memory_format=torch.channels_last)
        posterior = vae.encode(images).latent_dist
        for path, mean, logvar in zip(part, posterior.mean.float(), posterior.logvar.float(), strict=True):
            np.savez(out / f"{path.stem}.npz", mean=mean.numpy(), logvar=logvar.numpy())


def main() -> None:
    """Alternate the contestants, print every round, then the medians and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("../shared/data/caltech101"))
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--preset", default="f8c4")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--num-workers", type=int, default=1, help="of ours; the plain loops have none")
    given = parser.parse_args()
    torch.manual_seed(0)
    diffusers.logging.set_verbosity_error()  # it warns of every cast
    ours = AutoencoderKL.from_preset(given.preset).eval()
    plain = diffusers.AutoencoderKL(**preset_config(given.preset)).eval()
    plain.load_state_dict(ours.state_dict())
    fast = diffusers.AutoencoderKL(**preset_config(given.preset)).eval()
    fast.load_state_dict(ours.state_dict())
    fast = fast.to(torch.bfloat16).to(memory_format=torch.channels_last)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "images"
        folder.mkdir()
        count = copied(given.source, folder, given.images) if given.source.is_dir() else 0
        if not count:
            print(f"no JPEG files in {given.source}: made-up ones")
            made_up(folder, count := given.images)
        batches = decoded_batches(folder, given.resolution, given.batch_size)
        outs = (Path(temporary) / f"out{number}" for number in range(10**6))

        def bare(precision: Precision) -> None:
            encoder = LatentEncoder(
                load_autoencoder(ours), PixelFormat(), batch_size=given.batch_size, precision=precision,
                store="moments", dtype="fp16", seed=0, device=torch.device("cpu"),
            )  # fmt: skip
            for batch in batches:
                encoder.forward(batch, given.batch_size, precision)

        def end_to_end(precision: Precision) -> None:
            report = encode_dataset(
                folder, ours, next(outs), progress=False, precision=precision, resolution=given.resolution,
                batch_size=given.batch_size, small="upscale", num_workers=given.num_workers, device="cpu",
            )  # fmt: skip
            assert report.counts.ok == count, report

        contestants: dict[str, Callable[[], None]] = {}
        for precision in given.precision:
            contestants[f"bare {precision}"] = lambda precision=precision: bare(precision)
            contestants[f"ours {precision}"] = lambda precision=precision: end_to_end(precision)
        size, batch_size = given.resolution, given.batch_size
        if "fp32" in given.precision:
            contestants["(a) fp32"] = lambda: plain_loop(plain, folder, next(outs), size, batch_size, False)
        if "bf16" in given.precision:
            contestants["(b) bf16"] = lambda: plain_loop(fast, folder, next(outs), size, batch_size, True)

        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
        print(
            f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, load {load:.2f}; "
            f"{given.preset} at {size} px, {count} images a round, batches of {batch_size}"
        )
        with torch.no_grad():
            for precision in given.precision:  # kernels are chosen and memory is claimed before the clock runs
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    ours.encode(batches[0])
            plain.encode(batches[0])
            fast.encode(batches[0].to(torch.bfloat16, memory_format=torch.channels_last))
        speeds: dict[str, list[float]] = {name: [] for name in contestants}
        names = list(contestants)
        for number in range(given.rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:  # nobody always comes first
                began = time.perf_counter()
                contestants[name]()
                speeds[name].append(count / (time.perf_counter() - began))
                print(f"{number} {name:<10} {speeds[name][-1]:7.3f} images/s", flush=True)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    for name, median in medians.items():
        print(f"median {name:<10} {median:7.3f} images/s")
    for precision in given.precision:
        for other in (f"bare {precision}", "(a) fp32", "(b) bf16"):
            if other in medians:
                ratio = medians[f"ours {precision}"] / medians[other]
                print(f"ours {precision} / {other:<10} {ratio:6.3f}")


if __name__ == "__main__":
    main()
