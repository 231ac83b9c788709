"""A recipe becomes a trainer: the only place where configuration becomes objects."""

import logging
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, GradientAccumulationPlugin, ProjectConfiguration, parse_flag_from_env

from latentvae.checkpoint import load_model
from latentvae.config import dump_yaml
from latentvae.data.entries import ImageSource
from latentvae.data.pipeline import Batch, UnreadableImages, training_batches, validation_batches
from latentvae.data.sources import open_source
from latentvae.errors import UserError
from latentvae.images import PixelFormat
from latentvae.keyed import key_hash, split_by_key
from latentvae.losses.config import RESOLVED, LossConfig
from latentvae.losses.discriminator import PatchDiscriminator
from latentvae.losses.objective import Objective
from latentvae.losses.perceptual import check_size
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.recipe import Recipe
from latentvae.training.checkpoints import read_state
from latentvae.training.config import TrainingConfig
from latentvae.training.run_dir import RunDirectory
from latentvae.training.trainer import Trainer
from latentvae.training.validation import ValidationResult, validate

logger = logging.getLogger("latentvae")

SUPPORTED_STRATEGIES = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def build(recipe: Recipe, out: str | Path, *, resume: str | Path | None = None, progress: bool = True) -> Trainer:
    """Everything that `recipe` describes, ready to `train()`; writes the resolved recipe to `out`.

    Args:
        resume: None for a new run, "auto" for the newest checkpoint in `out`, or the path of a checkpoint.

    Raises:
        UserError: whatever the user can mend, before any work is done.
    """
    config, run = recipe.training, RunDirectory(out)
    if recipe.data.source is None:
        raise UserError("data.source is not set: pass --set data.source=FOLDER")
    local = processes()
    micro_batch, accumulation = config.accumulation(local.num_processes)
    checkpoint = run.find_checkpoint(resume)
    if checkpoint is None and resume is not None:
        logger.info("no checkpoint in %s yet: the run starts at its beginning", run.path)
    vae = make_model(recipe)
    check(recipe, vae)

    AcceleratorState._reset_state()  # it outlives a run: the next one in this process may want another precision
    accelerator = Accelerator(
        mixed_precision=resolve_precision(config, local.device),
        # A plugin, since a number would give way to what `accelerate config` left in the environment.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation),
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(run.path), logging_dir=str(run.path / "tensorboard")),
    )
    if accelerator.distributed_type not in SUPPORTED_STRATEGIES:
        raise UserError(
            f"{accelerator.distributed_type.value} is not supported: use plain DDP (accelerate's MULTI_GPU)"
        )
    channels = vae.config.in_channels
    resolution = recipe.validation.resolution or recipe.data.resolution
    images = _open_images(recipe, channels)

    loss = _resolved_loss(recipe, checkpoint)
    objective = Objective.from_config(loss, channels=channels, device=accelerator.device)
    discriminator = None
    if loss.has_adversarial:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed + 1)
            discriminator = PatchDiscriminator(channels, loss.discriminator).to(_dtype(config))
    resolved = recipe.model_copy(update={"loss": loss})
    settings = resolved.model_dump(mode="json")
    accelerator.wait_for_everyone()  # every process has looked at the folder before the first one writes to it
    if accelerator.is_main_process:
        run.begin(dump_yaml(resolved))

    share = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}

    def batches(images_seen: int) -> Generator[list[Batch], None, None]:
        return training_batches(
            images.training,
            recipe.data,
            images.pixels,
            seed=config.seed,
            start_image=images_seen,
            global_batch_size=config.global_batch_size,
            micro_batch_size=micro_batch,
            indices=images.training_indices,
            **share,
        )

    def measure(model: AutoencoderKL) -> ValidationResult:
        held_out = validation_batches(
            images.validation,
            recipe.data,
            images.pixels,
            resolution=resolution,
            batch_size=recipe.validation.batch_size,
            max_images=recipe.validation.max_images,
            indices=images.validation_indices,
            **share,
        )
        return validate(
            model,
            held_out,
            images.pixels,
            device=accelerator.device,
            perceptual=objective.perceptual,
            num_pictures=recipe.validation.num_pictures if accelerator.is_main_process else 0,
        )

    return Trainer(
        config,
        accelerator=accelerator,
        vae=vae,
        objective=objective,
        discriminator=discriminator,
        batches=batches,
        validate=measure,
        pixels=images.pixels,
        unreadable=UnreadableImages(recipe.data.max_unreadable),
        run=run,
        settings=settings,
        fine_tune=recipe.model.start_from is not None,
        resume=checkpoint,
        progress=progress,
    )


def check(recipe: Recipe, vae: AutoencoderKL) -> None:
    """Raise a UserError where the parts of a recipe do not fit each other; no image is read and nothing is written."""
    channels = vae.config.in_channels
    if vae.config.out_channels != channels:
        raise UserError(
            f"the model has {channels} input and {vae.config.out_channels} output channels; they must agree"
        )
    resolution = recipe.data.resolution
    for name, size in (("data", resolution), ("validation", recipe.validation.resolution or resolution)):
        if size % vae.downsample_factor:
            raise UserError(f"{name}.resolution is {size}; the model needs a multiple of {vae.downsample_factor}")
        if recipe.loss.has_perceptual and recipe.loss.perceptual != "none":
            check_size(recipe.loss.perceptual, size)
    if recipe.loss.has_adversarial:
        recipe.loss.discriminator.check_size(resolution)
    installed = [str(tracker) for tracker in get_available_trackers()]
    for tracker in recipe.training.trackers:  # Accelerate would leave one out without a word
        if tracker not in installed:
            raise UserError(
                f"training.trackers has {tracker}; usable here are {', '.join(installed)}: install its package, or "
                "leave it out"
            )


def _resolved_loss(recipe: Recipe, checkpoint: Path | None) -> LossConfig:
    """The loss with its starts in images; a continued run keeps those it had, also where it is made longer."""
    loss = recipe.loss
    if checkpoint is not None and (loss.discriminator_start, loss.adversarial_start) == (None, None):
        saved = read_state(checkpoint)["recipe"]["loss"]
        loss = loss.model_copy(update={name: saved[name] for name in RESOLVED if getattr(loss, name) is None})
    return loss.resolved(recipe.training.total_images)


def make_model(recipe: Recipe) -> AutoencoderKL:
    """The starting model, or a new one with weights drawn from `training.seed`, in `training.parameter_dtype`.

    Raises:
        UserError: the starting model cannot be loaded, or fields of a new model are set beside it.
    """
    model, dtype = recipe.model, _dtype(recipe.training)
    if model.start_from is not None:
        if model.overrides():
            field = next(iter(model.overrides()))
            raise UserError(f"model.{field} is set beside model.start_from: a starting model keeps its config")
        return load_model(
            model.start_from,
            subfolder=model.subfolder,
            revision=model.revision,
            variant=model.variant,
            torch_dtype=dtype,
        )
    with torch.random.fork_rng():
        torch.manual_seed(recipe.training.seed)
        vae = AutoencoderKL(**model.resolved())
    return vae.double() if dtype == torch.float64 else vae


def resolve_precision(config: TrainingConfig, device: torch.device) -> str:
    """What `mixed_precision: auto` means on this device; any other value is returned as it is.

    A CPU gets bf16 only where it computes in it (AVX512-BF16, AMX), an old GPU fp16, MPS float32.
    """
    if config.mixed_precision == "fp16" and device.type == "cpu":  # Accelerate would compute in float32 without a word
        raise UserError("training.mixed_precision is fp16, which a CPU does not train in: give auto, bf16 or no")
    if config.mixed_precision != "auto":
        return config.mixed_precision
    if config.parameter_dtype == "float64":
        return "no"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu":
        return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "no"
    return "no"


@dataclass(frozen=True)
class _Images:
    """The sources of a run; indices None stand for all."""

    pixels: PixelFormat
    training: ImageSource
    training_indices: list[int] | None
    validation: ImageSource
    validation_indices: list[int] | None


def _open_images(recipe: Recipe, channels: int) -> _Images:
    pixels, policy = recipe.data.pixels(channels), recipe.data.policy
    training = recipe.data.open(pixels)
    if recipe.validation.source is not None:
        validation = open_source(recipe.validation.source, pixels, policy)
        validation.entries()  # what is wrong with it is told before a run begins
        return _Images(pixels, training, None, validation, None)
    if not recipe.validation.fraction:  # nothing is held out: progress is watched on training images
        return _Images(pixels, training, None, training, None)
    keys = training.entries().keys
    kept, held_out = split_by_key(keys, recipe.validation.fraction)
    if not held_out and len(kept) > 1:  # a small set gives one image
        held_out = [min(kept, key=lambda index: key_hash("split", keys[index]))]
        kept.remove(held_out[0])
    if not kept or not held_out:
        raise UserError(
            f"validation.fraction {recipe.validation.fraction} of {len(training)} images leaves {len(kept)} to train "
            f"on and {len(held_out)} to validate on: give validation.source, another fraction, or 0 to validate on "
            "training images"
        )
    return _Images(pixels, training, kept, training, held_out)


def processes() -> PartialState:
    """Rank, device and number of processes. Only the first call decides: without the flag it would not find gloo."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def _dtype(config: TrainingConfig) -> torch.dtype:
    return torch.float64 if config.parameter_dtype == "float64" else torch.float32
