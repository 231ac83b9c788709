"""Our training step beside a plain implementation of the diffusers recipe: speed, memory, and what equal time buys.

    python benchmarks/training_step.py --source ../shared/data/caltech101
    python benchmarks/training_step.py --device cuda --preset f8c4 --resolution 256 --batch-size 16
    python benchmarks/training_step.py --quality --source ../shared/data/caltech101 --judge ../shared/data/bsds_test

Speed: the same weights, the same images in memory, all loss terms on (L2, LPIPS, KL, adversarial with the adaptive
weight), no EMA. Ours learns with the autoencoder and the discriminator on every batch; the plain implementation
(plain_training.py) on alternate batches. In turn, several rounds in one run, an even number of batches a turn:

    ours           Updater.update of the trainer, from uint8 images to both optimizer steps
    plain          the published script with its mistakes mended (plain_training.py lists them)
    as published   the script as it is

Printed as medians: `images/s`, that went through; `both/s`, images a second that each of the two networks learned from,
which is all of them for ours and half of them where batches alternate; ratios of both; the peak memory of each in a
process of its own (on a CPU the resident set, above what it was before the networks were made).

Where torch has no backbone for LPIPS in its cache, random weights of the same shapes stand in: they cost the same.
A CUDA machine needs diffusers, accelerate, lpips and torchvision too: both sides of the comparison use them.

Quality (--quality): see training_quality.py.
"""

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

try:
    import diffusers
    from plain_training import PlainConfig, PlainTraining
    from training_quality import OURS, PLAIN, PUBLISHED, add_arguments, measure_quality, plain_run, script_weights

    from latentvae.assembly import build
    from latentvae.images import PixelFormat, to_model
    from latentvae.losses.perceptual import WEIGHTS
    from latentvae.model.presets import preset_config
    from latentvae.recipe import Recipe, load_recipe
except ModuleNotFoundError as missing:
    raise SystemExit(f"{missing.name} is not installed: both sides of the comparison need it") from missing

BACKBONES = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}  # LPIPS's name => torchvision's
Learn = Callable[[int], None]  # takes the number of a batch and learns from it


@dataclass(frozen=True)
class Setting:
    """What every contestant of the speed part shares; `settings` are recipe overrides for ours alone."""

    preset: str
    resolution: int
    batch_size: int
    perceptual: str
    precision: str
    device: str
    allow_tf32: bool
    settings: tuple[str, ...] = ()


def our_recipe(setting: Setting, source: Path) -> Recipe:
    """All terms on from the first image, the script's weights in our units, no EMA."""
    weights = script_weights(setting.preset, setting.resolution)
    values = {
        "model.preset": setting.preset,
        "data.source": source,
        "data.resolution": setting.resolution,
        "data.num_workers": 0,
        "validation.fraction": 0,
        "loss.reconstruction": "l2",
        "loss.perceptual": setting.perceptual,
        "loss.perceptual_weight": weights.perceptual_weight,
        "loss.kl_weight": weights.kl_weight,
        "loss.adaptive_max": weights.adaptive_max,
        "loss.adversarial_weight": 1.0,
        "loss.discriminator_start": 0,
        "loss.adversarial_start": 0,
        "training.total_images": 10**9,  # it is never trained to its end
        "training.global_batch_size": setting.batch_size,
        "training.micro_batch_size": setting.batch_size,
        "training.learning_rate": PlainConfig.learning_rate,
        "training.mixed_precision": "bf16" if setting.precision == "bf16" else "no",
        "training.allow_tf32": str(setting.allow_tf32).lower(),
        "training.ema_decay": 0,
        "training.trackers": "[]",
    }
    return load_recipe(None, [*(f"{key}={value}" for key, value in values.items()), *setting.settings])


def contestants(names: Sequence[str], setting: Setting, source: Path, out: Path, num_batches: int) -> dict[str, Learn]:
    """Each of `names`, with the weights of one and the same new model, on the same `num_batches` images."""
    # Ours is made in any case: what it sets for the whole process, such as TF32, then holds for the others too.
    trainer = build(our_recipe(setting, source), out, progress=False)
    stream = trainer.batches(0)
    batches = list(islice(stream, num_batches))
    stream.close()
    weights = {key: value.clone() for key, value in trainer.vae.state_dict().items()}
    floats = [to_model(micro[0].images, PixelFormat()).to(setting.device) for micro in batches]
    updater = trainer.updater

    def ours(index: int) -> None:
        updater.update(batches[index % num_batches], index * setting.batch_size, stop=False)

    def plain(as_published: bool) -> Learn:
        vae = diffusers.AutoencoderKL(**preset_config(setting.preset))
        vae.load_state_dict(weights)
        training = PlainTraining(
            vae,
            PlainConfig(
                precision="bf16" if setting.precision == "bf16" else "fp32",
                as_published=as_published,
                perceptual=setting.perceptual,
                discriminator_start=0,
            ),
            setting.device,
        )
        return lambda index: training.step(floats[index % num_batches])

    return {name: ours if name == OURS else plain(name == PUBLISHED) for name in names}


def turn(learn: Learn, first: int, steps: int, setting: Setting) -> float:
    """Images a second over `steps` batches from number `first` on."""
    synchronize = torch.cuda.synchronize if setting.device == "cuda" else lambda: None
    synchronize()
    began = time.perf_counter()
    for index in range(first, first + steps):
        learn(index)
    synchronize()
    return steps * setting.batch_size / (time.perf_counter() - began)


def measure_speed(
    names: Sequence[str], setting: Setting, source: Path, *, rounds: int, steps: int
) -> dict[str, list[float]]:
    """Images a second of every round, by contestant; one turn of each goes before and is not counted."""
    speeds: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as out:
        made = contestants(names, setting, source, Path(out), steps)
        for number in range(-1, rounds):
            shift = number % len(names)
            for name in [*names[shift:], *names[:shift]]:  # nobody always comes first
                speed = turn(made[name], (number + 1) * steps, steps, setting)
                if number >= 0:
                    speeds[name].append(speed)
                    print(f"{number} {setting.precision} {name:<13} {speed:8.3f} images/s", flush=True)
        made.clear()
    gc.collect()
    return speeds


def resident_bytes() -> tuple[int, int]:
    """(now, highest so far) of this process; Linux only, else (0, 0)."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0, 0
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return 1024 * int(fields["VmRSS"].split()[0]), 1024 * int(fields["VmHWM"].split()[0])


def measure_memory(name: str, setting: Setting, source: Path, steps: int) -> int:
    """Peak bytes of one contestant, alone in this process; 0 where it cannot be known."""
    before, _ = resident_bytes()
    with tempfile.TemporaryDirectory() as out:
        made = contestants([name], setting, source, Path(out), steps)
        gc.collect()  # of our trainer, where it is not the contestant
        if setting.device == "cuda":
            torch.cuda.reset_peak_memory_stats(setting.device)
        turn(made[name], 0, steps, setting)
    if setting.device == "cuda":
        return torch.cuda.max_memory_allocated(setting.device)
    _, highest = resident_bytes()
    return highest - before if highest else 0


def child_memory(given: argparse.Namespace, name: str, precision: str, source: Path) -> int:
    """`measure_memory` in a new process."""
    command = [sys.executable, __file__, "--memory-of", name, "--precision", precision, "--source", str(source)]
    for option in ("device", "preset", "resolution", "batch_size", "perceptual", "steps"):
        command += [f"--{option.replace('_', '-')}", str(getattr(given, option))]
    command += ["--no-tf32"] * given.no_tf32 + [part for override in given.settings for part in ("--set", override)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(result.stdout.strip().splitlines()[-1])


def speed_part(given: argparse.Namespace, source: Path) -> None:
    """Alternate, print every round, then a table."""
    names = [OURS, PLAIN, PUBLISHED]
    lines = ["| | images/s | both/s | ours / it | ours / it, both | peak memory |", "|---|---|---|---|---|---|"]
    for precision in given.precision:
        speeds = measure_speed(names, setting_of(given, precision), source, rounds=given.rounds, steps=given.steps)
        medians = {name: statistics.median(values) for name, values in speeds.items()}
        for name, median in medians.items():
            both = median * (1.0 if name == OURS else 0.5)
            peak = child_memory(given, name, precision, source) / 2**20
            ratios = f"{medians[OURS] / median:.2f} | {medians[OURS] / both:.2f}"
            lines.append(f"| {precision} {name} | {median:.3f} | {both:.3f} | {ratios} | {peak:,.0f} MiB |")
    print("\n".join(["", *lines]))


def setting_of(given: argparse.Namespace, precision: str) -> Setting:
    """What the command line says, in one precision."""
    shared = {name: getattr(given, name) for name in ("preset", "resolution", "batch_size", "perceptual", "device")}
    return Setting(**shared, precision=precision, allow_tf32=not given.no_tf32, settings=tuple(given.settings))


def made_up_backbone(net: str, home: Path) -> None:
    """Random weights of LPIPS's backbone, where torch.hub looks for them under `home`."""
    import torchvision

    file = home / "hub" / "checkpoints" / WEIGHTS[net]
    file.parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(getattr(torchvision.models, BACKBONES[net])().state_dict(), file)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("../shared/data/caltech101"))
    parser.add_argument("--preset", help="f8c4-small; f8c4-tiny for --quality")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--perceptual", choices=[*BACKBONES, "none"], default="squeeze")
    parser.add_argument("--rounds", type=int, help="5; 1 for --quality")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="ours alone")
    speed = parser.add_argument_group("speed")
    speed.add_argument("--resolution", type=int, default=128)
    speed.add_argument("--batch-size", type=int, default=8)
    speed.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    speed.add_argument("--steps", type=int, default=2, help="batches a turn, even: one of each kind at least")
    speed.add_argument("--no-tf32", action="store_true", help="TensorFloat-32 is off for all on an NVIDIA GPU")
    speed.add_argument("--memory-of", choices=[OURS, PLAIN, PUBLISHED], help=argparse.SUPPRESS)  # the child process
    quality = parser.add_argument_group("quality")
    quality.add_argument("--as-published", action="store_true", help="the script as it is, too")
    add_arguments(quality)
    given = parser.parse_args(arguments)
    if given.steps < 2 or given.steps % 2:
        parser.error(f"--steps is {given.steps}: give an even number, since the plain implementation alternates")
    is_quality = given.quality or given.plain_run is not None
    given.preset = given.preset or ("f8c4-tiny" if is_quality else "f8c4-small")
    given.rounds = given.rounds or (1 if is_quality else 5)
    return given


def main(arguments: Sequence[str] | None = None) -> None:
    """One of the parts, or a child process of one of them."""
    given = parse(arguments)
    diffusers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="torchvision|lpips")  # lpips asks torchvision with deprecated arguments
    if given.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # ours would take the accelerator otherwise
    elif not torch.cuda.is_available():
        raise SystemExit("--device is cuda, which torch does not find here: give cpu")
    if given.plain_run is not None:
        plain_run(given)
        return
    if given.memory_of is not None:
        print(measure_memory(given.memory_of, setting_of(given, given.precision[0]), given.source, given.steps))
        return
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, load {load:.2f}")
    if given.quality:
        measure_quality(given)
        return
    device = torch.cuda.get_device_name() if given.device == "cuda" else "cpu"
    print(f"{device}: {given.preset}, {given.resolution} px, batches of {given.batch_size}, LPIPS {given.perceptual}")
    with tempfile.TemporaryDirectory() as temporary:
        source, folder = given.source, Path(temporary)
        if not source.is_dir():
            from encode_throughput import made_up

            print(f"{source} is absent: made-up images")
            (source := folder / "images").mkdir()
            made_up(source, given.batch_size * given.steps)
        net = given.perceptual
        if net != "none" and not (Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS[net]).is_file():
            print(f"LPIPS-{net} has no weights here: random ones, which cost the same")
            made_up_backbone(net, folder)
            os.environ["TORCH_HOME"] = str(folder)  # where the child processes look, too
        speed_part(given, source)


if __name__ == "__main__":
    main()
