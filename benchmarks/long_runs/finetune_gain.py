"""What fine-tuning gains and what it moves: decoder only, all with a latent anchor, and EQ-VAE, each from one base.

    python benchmarks/long_runs/finetune_gain.py --base RUN/model --images ../shared/data/clothing \\
        --base-images ../shared/data/caltech101 --judge ../shared/data/bsds_test

Decoder only and `all` train on --images and are measured on a fifth of them that is held out; EQ-VAE trains on four
fifths of --base-images, is measured on the last fifth, on which its share is to be chosen, and on every folder of
--judge, beside the same fine-tune without it. PSNR and LPIPS (squeeze) by the training
validation: posterior mode, float32, 8 bits.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from latentvae.checkpoint import load_model, model_hashes
from latentvae.data import Batch, DataConfig, open_source, split_by_key, validation_batches, validation_indices
from latentvae.images import PixelFormat, to_model
from latentvae.losses.perceptual import Perceptual
from latentvae.training.perturbation import equivariance_error
from latentvae.training.validation import validate

HELD_OUT = 0.2
PARTS = ("decoder", "all", "eq", "no-eq")
COMMON = (  # for a tiny model on two cores; the recipes' own values are for full-sized models on a GPU
    "training.learning_rate=3e-4",
    "training.global_batch_size=16",
    "training.micro_batch_size=16",
    "training.total_images=1000000",
    "training.warmup_images=800",
    "training.schedule=cosine",
    "training.ema_decay=0.99",
    "training.ema_warmup_steps=50",
    "training.gradient_checkpointing=false",
    "training.trackers=[]",
    "training.validate_every_images=4000",
    "training.save_every_images=100000",
    "training.log_every_images=800",
    "data.num_workers=1",
    "loss.perceptual=squeeze",
    "validation.max_images=100",
)
AS_BASE = (  # the loss of hour_cpu: the fine-tunes beside each other differ in the equivariance alone
    "loss.perceptual_weight=0.3",  # and no discriminator, which would need more images than minutes on two cores give
    "loss.adversarial_weight=0",
    "loss.autoencoder_start=0",
    "loss.discriminator_start=null",
    "loss.adversarial_start=null",
)


@dataclass(frozen=True)
class Judged:
    """Means over images."""

    psnr: float
    lpips: float
    equivariance: float


def judged(model: Path, images: Path, size: int, fraction: float) -> Judged:
    """Measure a model on the held-out part of a folder (fraction 1: all of it)."""
    vae, pixels = load_model(model), PixelFormat()
    source = open_source(images, pixels)
    held_out = None if fraction == 1 else split_by_key(source.entries().keys, fraction)[1]
    chosen = validation_indices(source, held_out, 100)

    def batches() -> Iterator[Batch]:
        return validation_batches(
            source, DataConfig(num_workers=0), pixels, resolution=size, batch_size=8, chosen=chosen
        )

    metrics = validate(vae, batches(), pixels, device=torch.device("cpu"), perceptual=Perceptual("squeeze")).metrics
    with torch.no_grad():
        errors = torch.cat([equivariance_error(vae, to_model(batch.images, pixels)) for batch in batches()])
    return Judged(metrics["psnr"], metrics["lpips"], errors.mean().item())


def finetune(recipe: str, base: Path, images: Path, out: Path, minutes: float, size: int, *settings: str) -> Path:
    """Run a shipped recipe; returns the folder of the run."""
    chosen = [
        *COMMON,
        f"model.start_from={base}",
        f"data.source={images}",
        f"data.resolution={size}",
        f"training.max_minutes={minutes}",
        f"validation.fraction={HELD_OUT}",
        *settings,
    ]
    overrides = [part for setting in chosen for part in ("--set", setting)]
    command = [sys.executable, "-m", "latentvae", "train", "--recipe", recipe, "--out", str(out), *overrides]
    subprocess.run(command, check=True)
    return out


def row(name: str, result: Judged) -> str:
    return f"| {name} | {result.psnr:.2f} | {result.lpips:.4f} | {result.equivariance:.5f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=Path("runs/hour/model"), help="folder of the starting model")
    parser.add_argument("--images", type=Path, default=Path("../shared/data/clothing"))
    parser.add_argument("--base-images", type=Path, default=Path("../shared/data/caltech101"))
    parser.add_argument("--judge", type=Path, nargs="*", default=[Path("../shared/data/bsds_test")])
    parser.add_argument("--out", type=Path, default=Path("runs/finetune_gain"))
    parser.add_argument("--minutes", type=float, default=5.0, help="of decoder and all; three times as long for EQ-VAE")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="which fine-tunes  [default: all]")
    parser.add_argument("--equivariance", type=float, help="share of the steps that transform  [the recipe's]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=64, help="of training images, pixels")
    parser.add_argument("--judge-size", type=int, default=128)
    arguments = parser.parse_args()
    base, minutes, size = arguments.base, arguments.minutes, arguments.size
    table = ["| model, images | PSNR | LPIPS | equivariance error |", "|---|---|---|---|"]
    notes = []

    here = (arguments.images, arguments.judge_size, HELD_OUT)
    table.append(row("base, held-out part of --images", judged(base, *here)))
    runs = {
        "decoder": ("decoder only", ()),
        "all": ("all, anchor 1", ("training.trainable=all", "loss.anchor_weight=1.0")),
    }
    for part, (name, settings) in runs.items():
        if part not in arguments.parts:
            continue
        run = finetune("finetune_decoder", base, arguments.images, arguments.out / part, minutes, size, *settings)
        table.append(row(f"{name}, held-out part of --images", judged(run / "model", *here)))
        drift = json.loads((run / "drift.json").read_text())
        notes.append(f"{name}: {json.dumps({key: drift[key] for key in sorted(drift)})}")
        same = model_hashes(load_model(run / "model")).encoder == model_hashes(load_model(base)).encoder
        notes.append(f"{name}: encoder {'unchanged' if same else 'changed'}")

    size_there = arguments.judge_size
    there = {f"held-out part of {arguments.base_images.name}": (arguments.base_images, size_there, HELD_OUT)}
    there |= {folder.name: (folder, size_there, 1.0) for folder in arguments.judge}
    table += [row(f"base, {name}", judged(base, *images)) for name, images in there.items()]
    for part, name, probability in (("eq", "EQ-VAE", arguments.equivariance), ("no-eq", "the same without", 0.0)):
        if part not in arguments.parts:
            continue
        share = () if probability is None else (f"loss.equivariance={probability}",)
        settings = (*share, f"training.seed={arguments.seed}", *AS_BASE)
        run = finetune("finetune_eq", base, arguments.base_images, arguments.out / part, 3 * minutes, size, *settings)
        table += [row(f"{name}, {images}", judged(run / "model", *how)) for images, how in there.items()]
    print("\n".join([*table, "", *notes]))


if __name__ == "__main__":
    main()
