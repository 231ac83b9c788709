"""What three minutes on this CPU give: the recipe smoke_cpu beside a plain loop around diffusers.AutoencoderKL.

    python benchmarks/smoke_recipe.py --train ../shared/data/caltech101 --judge ../shared/data/bsds_test

The two train alternately, each in a process of its own, on the same images, at the same widths and for the same time.
Printed: PSNR at 128 px on the judging images (posterior mode, float32, rounded to 8 bits), as decibels above each
image's mean colour; LPIPS (squeeze) where torch finds the backbone. `--perceptual` adds the recipe with LPIPS on.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import diffusers
import torch

from latentvae.data import open_source
from latentvae.errors import UserError
from latentvae.evaluation.metrics import psnr
from latentvae.images import PixelFormat, center_crop, from_model, resize_shorter_side, to_model
from latentvae.losses.perceptual import Perceptual
from latentvae.model.presets import preset_config

SIZE = 128


def plain_loop(train: Path, out: Path, minutes: float) -> None:
    """What a user writes in half an hour: torchvision's folder, AdamW at a constant rate, bf16 where the CPU has it."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    torch.manual_seed(0)
    cut = [transforms.Resize(64), transforms.RandomCrop(64), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    images = ImageFolder(train, transforms.Compose([*cut, transforms.Normalize([0.5] * 3, [0.5] * 3)]))
    loader = torch.utils.data.DataLoader(images, batch_size=16, shuffle=True, drop_last=True, num_workers=1)
    vae = diffusers.AutoencoderKL(**preset_config("f8c4-tiny"))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3)
    began, seen = time.monotonic(), 0
    while time.monotonic() - began < 60 * minutes:
        for batch, _ in loader:
            with torch.autocast("cpu", torch.bfloat16):
                posterior = vae.encode(batch).latent_dist
                reconstruction = vae.decode(posterior.sample()).sample
            loss = (reconstruction.float() - batch).square().mean() + 1e-8 * posterior.kl().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen += len(batch)
            if time.monotonic() - began >= 60 * minutes:
                break
    print(f"plain loop: {seen} images")
    vae.save_pretrained(out)


def recipe(train: Path, judge: Path, out: Path, minutes: float, *settings: str) -> None:
    """The shipped recipe, as a user calls it."""
    chosen = [f"data.source={train}", f"validation.source={judge}", f"training.max_minutes={minutes}", *settings]
    overrides = [part for setting in chosen for part in ("--set", setting)]
    command = [sys.executable, "-m", "latentvae", "train", "--recipe", "smoke_cpu", *overrides, "--out", str(out)]
    subprocess.run(command, check=True)


@torch.no_grad()
def judged(model: Path, judge: Path, lpips: Perceptual | None) -> tuple[float, float, float]:
    """(PSNR above mean colour, PSNR, LPIPS) of a model folder, loaded by plain diffusers, means over the images."""
    vae, pixels = diffusers.AutoencoderKL.from_pretrained(model), PixelFormat()
    source, rows = open_source(judge), []
    for index in range(len(source)):
        array = center_crop(resize_shorter_side(source.read(index), SIZE), SIZE)
        original = torch.from_numpy(array.copy())[None]  # (1, H, W, 3)
        images = to_model(original, pixels)
        decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample
        flat = original.double().mean((1, 2), keepdim=True).expand(original.shape)
        reached = psnr(original, from_model(decoded, pixels)).item()
        distance = lpips(images, decoded).item() if lpips is not None else float("nan")
        rows.append((reached - psnr(original, flat).item(), reached, distance))
    gain, reached, distance = (statistics.fmean(column) for column in zip(*rows, strict=True))
    return gain, reached, distance


def main() -> None:
    """Alternate the contestants and print a line for each run, then the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, default=Path("../shared/data/caltech101"))
    parser.add_argument("--judge", type=Path, default=Path("../shared/data/bsds_test"))
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--perceptual", action="store_true", help="also the recipe with LPIPS (squeeze) on")
    parser.add_argument("--plain-loop", type=Path, metavar="OUT", help=argparse.SUPPRESS)  # the child process
    given = parser.parse_args()
    if given.plain_loop is not None:
        plain_loop(given.train, given.plain_loop, given.minutes)
        return
    for folder in (given.train, given.judge):
        if not folder.is_dir():
            print(f"skipped: {folder} is absent; pass --train and --judge")
            return
    try:
        lpips = Perceptual("squeeze")
    except UserError as error:
        print(f"LPIPS is not measured: {error}")
        lpips = None
    contestants = ["recipe", "plain loop"] + (["recipe with LPIPS"] if given.perceptual else [])
    results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in contestants}
    print(
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, {given.minutes} minutes"
    )
    for pair in range(given.pairs):
        for name in contestants:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "run"
                if name == "plain loop":
                    options = ["--train", str(given.train), "--minutes", str(given.minutes), "--plain-loop", str(out)]
                    subprocess.run([sys.executable, __file__, *options], check=True)
                    model = out
                else:
                    settings = ["loss.perceptual=squeeze"] if "LPIPS" in name else []
                    recipe(given.train, given.judge, out, given.minutes, *settings)
                    model = out / "model"
                results[name].append(judged(model, given.judge, lpips))
            gain, reached, distance = results[name][-1]
            print(
                f"{pair} {name:<18} +{gain:.2f} dB over mean colour ({reached:.2f} dB), LPIPS {distance:.3f}",
                flush=True,
            )
    for name, rows in results.items():
        gain, reached, distance = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"median {name:<18} +{gain:.2f} dB ({reached:.2f} dB), LPIPS {distance:.3f}")


if __name__ == "__main__":
    main()
