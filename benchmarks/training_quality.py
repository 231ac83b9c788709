"""What equal seconds of training buy: the part of training_step.py that is asked for with --quality.

One network, one folder of images, the same seconds, each in a process of its own. PSNR at 128 px as in smoke_recipe.py.

    ours           the recipe smoke_cpu with the published script's loss: L2 + 0.5 LPIPS + 1e-6 KL (in LDM's units)
    plain          plain_training.py, the script with its mistakes mended, at --plain-learning-rate,
                   --plain-resolution and --plain-batch-size
    smoke_cpu      our recipe as it is shipped, with --shipped
    as published   the script as it is, with --as-published: its learning rate of 4.5e-6 and its batches of 4 too

The script's learning rate is one for fine-tuning, with which three minutes change little; so `plain` gets a better one.

The script's discriminator starts after 50,001 batches, which no such run reaches; --adversarial-start IMAGES starts it
there in both (ours trains its discriminator from three quarters of that on, as its defaults do).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
from plain_training import PlainConfig, train_plain
from smoke_recipe import judged, recipe

from latentvae.errors import UserError
from latentvae.losses.perceptual import Perceptual
from latentvae.losses.terms import LDMWeights, LossWeights, from_ldm_units
from latentvae.model.presets import preset_config

OURS, PLAIN, SHIPPED, PUBLISHED = "ours", "plain", "smoke_cpu", "as published"
OUR_RESOLUTION = 64  # of the recipe smoke_cpu


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    """The options of this part."""
    parser.add_argument("--quality", action="store_true", help="measure this instead of speed")
    parser.add_argument("--judge", type=Path, default=Path("../shared/data/bsds_test"))
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--shipped", action="store_true", help="the recipe smoke_cpu as it is, too")
    parser.add_argument("--adversarial-start", type=int, metavar="IMAGES", help="both feel a discriminator from here")
    parser.add_argument("--plain-learning-rate", type=float, default=1e-3)
    parser.add_argument("--plain-resolution", type=int, default=128)
    parser.add_argument("--plain-batch-size", type=int, default=4)
    parser.add_argument("--plain-run", type=Path, metavar="OUT", help=argparse.SUPPRESS)  # the child process


def script_weights(preset: str, resolution: int) -> LossWeights:
    """The script's weights, 0.5 LPIPS and 1e-6 KL beside sums over pixels, in our units."""
    config = preset_config(preset)
    return from_ldm_units(
        LDMWeights(perceptual_weight=0.5),
        downsample_factor=2 ** (len(config["block_out_channels"]) - 1),
        latent_channels=config["latent_channels"],
        resolution=resolution,
    )


def measure_quality(given: argparse.Namespace) -> None:
    """Train each for the same time, judge each by the same protocol, print a table of medians."""
    for folder in (given.source, given.judge):
        if not folder.is_dir():
            print(f"skipped: {folder} is absent; pass --source and --judge")
            return
    try:
        lpips = Perceptual("squeeze")
    except UserError as error:
        raise SystemExit(f"the loss needs LPIPS: {error}") from error
    names = [OURS, PLAIN] + [SHIPPED] * given.shipped + [PUBLISHED] * given.as_published
    results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    for number in range(given.rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:  # nobody always comes first
            with tempfile.TemporaryDirectory() as folder:
                gain, reached, distance = judged(train(name, given, Path(folder) / "run"), given.judge, lpips)
            results[name].append((gain, reached, distance))
            print(f"{number} {name:<13} {reached:.2f} dB ({gain:+.2f}), LPIPS {distance:.3f}", flush=True)
    print("\n| | PSNR above mean colour | PSNR | LPIPS (squeeze) |\n|---|---|---|---|")
    for name, rows in results.items():
        gain, reached, distance = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"| {name} | {gain:+.2f} dB | {reached:.2f} dB | {distance:.3f} |")


def train(name: str, given: argparse.Namespace, out: Path) -> Path:
    """Train one of them in a process of its own; the folder of the finished model."""
    if name in (OURS, SHIPPED):
        settings = [f"model.preset={given.preset}"]
        if name == OURS:
            settings += [*script_loss(given), *given.settings]
        recipe(given.source, given.judge, out, given.seconds / 60, *settings)
        return out / "model"
    command = [sys.executable, str(Path(__file__).with_name("training_step.py")), "--plain-run", str(out)]
    for option in (
        "source", "seconds", "preset", "perceptual", "device", "adversarial_start",
        "plain_learning_rate", "plain_resolution", "plain_batch_size",
    ):  # fmt: skip
        value = getattr(given, option)
        if value is not None:
            command += [f"--{option.replace('_', '-')}", str(value)]
    subprocess.run(command + ["--as-published"] * (name == PUBLISHED), check=True)
    return out


def script_loss(given: argparse.Namespace) -> list[str]:
    """The script's loss as settings of our recipe."""
    weights = script_weights(given.preset, OUR_RESOLUTION)
    settings = [
        "loss.reconstruction=l2",
        f"loss.perceptual={given.perceptual}",
        f"loss.perceptual_weight={weights.perceptual_weight}",
        f"loss.kl_weight={weights.kl_weight}",
    ]
    if given.adversarial_start is not None:
        settings += [
            "loss.adversarial_weight=1.0",
            f"loss.adaptive_max={weights.adaptive_max}",
            f"loss.discriminator_start={3 * given.adversarial_start // 4}",
            f"loss.adversarial_start={given.adversarial_start}",
        ]
    return settings


def plain_run(given: argparse.Namespace) -> None:
    """The child process: train the plain implementation and save its model; bf16 where ours takes it too."""
    is_bf16 = given.device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    config = PlainConfig(
        precision="bf16" if is_bf16 else "fp32", as_published=given.as_published, perceptual=given.perceptual
    )
    if not given.as_published:
        config = replace(config, learning_rate=given.plain_learning_rate)
    if given.adversarial_start is not None:
        config = replace(config, discriminator_start=given.adversarial_start)
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(**preset_config(given.preset))
    training = train_plain(
        vae,
        config,
        given.source,
        seconds=given.seconds,
        resolution=given.plain_resolution,
        batch_size=4 if given.as_published else given.plain_batch_size,
        device=given.device,
    )
    vae.float().save_pretrained(given.plain_run)
    figures = json.dumps({name: round(value, 4) for name, value in training.logs.items()})
    print(f"plain: {training.images_seen} images, {training.autoencoder_images} for the autoencoder; last {figures}")
