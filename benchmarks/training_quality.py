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

--search chooses the batch size and the learning rate of `ours` and of `plain` alike: each pair of --batch-sizes and
--learning-rates trains on 95 % of the images for the same time, and the best PSNR on the rest, which it has not
seen wins. The images of --judge have no part in it. Round n trains with seed n; the search with seed 0.
"""

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import diffusers
import torch
from plain_training import PlainConfig, train_plain
from smoke_recipe import judged, recipe

from latentvae.data import open_source, split_by_key
from latentvae.errors import UserError
from latentvae.losses.perceptual import Perceptual
from latentvae.losses.terms import LDMWeights, LossWeights, from_ldm_units
from latentvae.model.presets import preset_config

OURS, PLAIN, SHIPPED, PUBLISHED = "ours", "plain", "smoke_cpu", "as published"
OUR_RESOLUTION = 64  # of the recipe smoke_cpu
HELD_OUT = 0.05  # of --source, what --search judges on


@dataclass(frozen=True)
class Choice:
    """What --search searches."""

    batch_size: int
    learning_rate: float

    def __str__(self) -> str:
        return f"batches of {self.batch_size}, learning rate {self.learning_rate:g}"


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
    parser.add_argument("--search", action="store_true", help="choose batch size and learning rate of both first")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 8, 16], help="that --search tries")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 3e-3], help="that --search tries")
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)  # of the child process
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
    choices = {PLAIN: Choice(given.plain_batch_size, given.plain_learning_rate)}
    if given.search:
        choices = search(given, lpips)
    names = [OURS, PLAIN] + [SHIPPED] * given.shipped + [PUBLISHED] * given.as_published
    results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    for number in range(given.rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:  # nobody always comes first
            with tempfile.TemporaryDirectory() as folder:
                model = train(name, given, given.source, Path(folder) / "run", choices.get(name), seed=number)
                gain, reached, distance = judged(model, given.judge, lpips)
            results[name].append((gain, reached, distance))
            print(f"{number} {name:<13} {reached:.2f} dB ({gain:+.2f}), LPIPS {distance:.3f}", flush=True)
    print("\n| | PSNR above mean colour | PSNR | LPIPS (squeeze) |\n|---|---|---|---|")
    for name, rows in results.items():
        gain, reached, distance = (statistics.median(column) for column in zip(*rows, strict=True))
        print(f"| {name} | {gain:+.2f} dB | {reached:.2f} dB | {distance:.3f} |")


def search(given: argparse.Namespace, lpips: Perceptual) -> dict[str, Choice]:
    """The best choice of each contestant, by PSNR on images of --source that it was not trained on."""
    with tempfile.TemporaryDirectory() as temporary:
        learned, held_out = Path(temporary) / "learned", Path(temporary) / "held_out"
        keys = open_source(given.source).entries().keys
        for folder, indices in zip((learned, held_out), split_by_key(keys, HELD_OUT), strict=True):
            for index in indices:
                (folder / keys[index]).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(given.source / keys[index], folder / keys[index])
        results: dict[str, dict[Choice, float]] = {OURS: {}, PLAIN: {}}
        for pair in itertools.product(given.batch_sizes, given.learning_rates):
            choice = Choice(*pair)
            for name, reached in results.items():
                with tempfile.TemporaryDirectory() as folder:
                    model = train(name, given, learned, Path(folder) / "run", choice, seed=0)
                    _, reached[choice], distance = judged(model, held_out, lpips)
                print(f"search {name:<13} {choice}: {reached[choice]:.2f} dB, LPIPS {distance:.3f}", flush=True)
    chosen = {name: max(reached, key=lambda choice: reached[choice]) for name, reached in results.items()}
    for name, choice in chosen.items():
        print(f"chosen {name:<13} {choice}", flush=True)
    return chosen


def train(name: str, given: argparse.Namespace, source: Path, out: Path, choice: Choice | None, *, seed: int) -> Path:
    """Train one of them in a process of its own; the folder of the finished model."""
    if name in (OURS, SHIPPED):
        settings = [f"model.preset={given.preset}", f"training.seed={seed}"]
        if name == OURS:
            settings += script_loss(given)
            if choice is not None:
                settings += [
                    f"training.global_batch_size={choice.batch_size}",
                    f"training.micro_batch_size={choice.batch_size}",
                    f"training.learning_rate={choice.learning_rate}",
                ]
            settings += given.settings
        recipe(source, given.judge, out, given.seconds / 60, *settings)
        return out / "model"
    command = [sys.executable, str(Path(__file__).with_name("training_step.py")), "--plain-run", str(out)]
    command += ["--source", str(source), "--seed", str(seed)]
    if choice is not None:
        command += ["--plain-batch-size", str(choice.batch_size), "--plain-learning-rate", str(choice.learning_rate)]
    for option in ("seconds", "preset", "perceptual", "device", "adversarial_start", "plain_resolution"):
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
    torch.manual_seed(given.seed)
    vae = diffusers.AutoencoderKL(**preset_config(given.preset))
    training = train_plain(
        vae,
        config,
        given.source,
        seconds=given.seconds,
        resolution=given.plain_resolution,
        batch_size=4 if given.as_published else given.plain_batch_size,
        seed=given.seed,
        device=given.device,
    )
    vae.float().save_pretrained(given.plain_run)
    figures = json.dumps({name: round(value, 4) for name, value in training.logs.items()})
    print(f"plain: {training.images_seen} images, {training.autoencoder_images} for the autoencoder; last {figures}")
