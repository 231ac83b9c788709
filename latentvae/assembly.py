"""A recipe becomes a trainer: the only place where configuration becomes objects."""

import logging
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)

from latentvae.config import dump_yaml
from latentvae.data import (
    Batch,
    DataConfig,
    ImageSource,
    UnreadableImages,
    image_sizes,
    open_source,
    plan_summary,
    split_by_key,
    training_batches,
    validation_batches,
    validation_indices,
)
from latentvae.errors import UserError
from latentvae.images import PixelFormat
from latentvae.keyed import key_hash
from latentvae.losses.config import RESOLVED, LossConfig
from latentvae.losses.discriminator import PatchDiscriminator
from latentvae.losses.objective import Objective
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.model.scaling import LatentScaling
from latentvae.recipe import Recipe, check, make_model, parameter_dtype, require_given
from latentvae.training.checkpoints import read_state
from latentvae.training.config import TrainingConfig
from latentvae.training.drift import DriftReport, measure_drift
from latentvae.training.precision import resolve_precision
from latentvae.training.run_dir import RunDirectory
from latentvae.training.starting import StartingModel
from latentvae.training.trainer import Trainer
from latentvae.training.validation import ValidationResult, validate

logger = logging.getLogger("latentvae")
FindingT = TypeVar("FindingT")

SUPPORTED_STRATEGIES = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
REFUSED_STRATEGIES = {  # what `accelerate launch` sets => what it was configured for
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "Accelerate's parallelism_config",
}


def build(recipe: Recipe, out: str | Path, *, resume: str | Path | None = None, progress: bool = True) -> Trainer:
    """Everything that `recipe` describes, ready to `train()`; writes the resolved recipe to `out`.

    Args:
        resume: None for a new run, "auto" for the newest checkpoint in `out`, or the path of a checkpoint.

    Raises:
        UserError: whatever the user can mend, before any work is done.
    """
    config, run = recipe.training, RunDirectory(out)
    require_given(recipe)
    refuse_strategies()
    local = processes()
    if (other := _agreed(run.other_trainer())) is not None:
        raise UserError(f"process {other} is training in {run.path}: wait until it has ended, or choose another --out")
    checkpoint = _agreed(run.find_checkpoint(resume))
    state = read_state(checkpoint) if checkpoint is not None else {}
    micro_batch = _micro_batch(config, local.num_processes, state)
    _, accumulation = config.accumulation(local.num_processes, micro_batch or 1)
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
        raise _unsupported(accelerator.distributed_type.value)
    channels = vae.config.in_channels
    images = open_images(recipe, channels)
    sizes = _image_sizes(recipe.data, images.training, accelerator)
    if accelerator.is_main_process:
        for line in images.summary(recipe, sizes):
            logger.info(line)

    loss = _resolved_loss(recipe, state)
    scaling = LatentScaling.from_config(vae.config)
    scale = scaling.scale if scaling.std is None else [scaling.scale / std for std in scaling.std]
    objective = Objective.from_config(loss, channels=channels, device=accelerator.device, latent_scale=scale)
    starting = None
    if recipe.model.start_from is not None:
        starting = StartingModel(vae, anchor_device=accelerator.device if loss.anchor_weight else None)
    discriminator = None
    if loss.has_adversarial:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed + 1)
            discriminator = PatchDiscriminator(channels, loss.discriminator).to(parameter_dtype(config))
    resolved = recipe.model_copy(update={"loss": loss})
    settings = resolved.model_dump(mode="json")
    accelerator.wait_for_everyone()  # every process has looked at the folder before the first one writes to it
    if accelerator.is_main_process:
        run.prepare()

    share = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}

    def batches(images_seen: int) -> Generator[list[Batch], None, None]:
        assert micro_batch is not None
        return training_batches(
            images.training,
            recipe.data,
            images.pixels,
            seed=config.seed,
            start_image=images_seen,
            global_batch_size=config.global_batch_size,
            micro_batch_size=micro_batch,
            indices=images.training_indices,
            sizes=sizes,
            **share,
        )

    def held_out() -> Iterator[Batch]:
        return validation_batches(
            images.validation,
            recipe.data,
            images.pixels,
            resolution=recipe.validation.resolution or recipe.data.resolution,
            batch_size=recipe.validation.batch_size,
            chosen=images.validation_indices,
            **share,
        )

    def measure(model: AutoencoderKL) -> ValidationResult:
        return validate(
            model,
            held_out(),
            images.pixels,
            device=accelerator.device,
            perceptual=objective.perceptual,
            num_pictures=recipe.validation.num_pictures if accelerator.is_main_process else 0,
            has_equivariance=loss.equivariance > 0,
        )

    def drift(model: AutoencoderKL) -> DriftReport:
        assert starting is not None
        return measure_drift(starting, model, held_out(), images.pixels, accelerator.device)

    trainer = Trainer(
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
        starting=starting,
        drift=drift if starting is not None else None,
        resume=checkpoint,
        progress=progress,
    )
    if micro_batch is None:
        per_process = config.global_batch_size // accelerator.num_processes
        width, height = max(recipe.data.image_sizes, key=lambda size: size[0] * size[1])
        limit = trainer.updater.largest_micro_batch(per_process, height, width)
        micro_batch, accelerator.gradient_accumulation_steps = config.accumulation(accelerator.num_processes, limit)
        logger.info("training.micro_batch_size auto: %d images fit into a forward", micro_batch)
    trainer.micro_batch = {"num_processes": accelerator.num_processes, "size": micro_batch}
    if accelerator.is_main_process:
        run.begin(dump_yaml(resolved))  # not before: what is refused must not replace the recipe of the run
    return trainer


def _micro_batch(config: TrainingConfig, num_processes: int, state: dict[str, Any]) -> int | None:
    """Images per forward; None where they are still to be measured. A continued run keeps what it measured."""
    limit = None
    if config.micro_batch_size == "auto":
        before = state.get("micro_batch") or {}
        was_measured = bool(state) and state["recipe"]["training"]["micro_batch_size"] == "auto"
        if not was_measured or before.get("num_processes") != num_processes:
            config.accumulation(num_processes, 1)  # refuses what does not divide
            return None
        limit = before["size"]
    return config.accumulation(num_processes, limit)[0]


def _resolved_loss(recipe: Recipe, state: dict[str, Any]) -> LossConfig:
    """The loss with its phases in images; a continued run keeps those it had, also where it is made longer."""
    loss = recipe.loss
    if state:
        saved = state["recipe"]["loss"]
        kept = {name: saved[name] for name in RESOLVED if getattr(loss, name) is None}
        starts = ("discriminator_start", "adversarial_start")
        if any(getattr(loss, name) not in (None, saved[name]) for name in starts):  # set anew: the other follows it
            kept = {name: value for name, value in kept.items() if name.startswith("kl_")}
        loss = loss.model_copy(update=kept)
    return loss.resolved(recipe.training.total_images)


@dataclass(frozen=True)
class RunImages:
    """The sources of a run; indices None stand for all."""

    pixels: PixelFormat
    training: ImageSource
    training_indices: list[int] | None
    validation: ImageSource
    validation_indices: list[int]

    def summary(self, recipe: Recipe, sizes: np.ndarray | None = None) -> list[str]:
        """What is trained on, a line each; `sizes` as for `plan_summary`."""
        batch = recipe.training.global_batch_size
        return plan_summary(
            recipe.data, self.training, indices=self.training_indices, global_batch_size=batch, sizes=sizes
        )


def open_images(recipe: Recipe, channels: int) -> RunImages:
    """Everything that a run reads images from, listed. Raises UserError where it cannot be."""
    pixels, limit = recipe.data.pixels(channels), recipe.validation.max_images
    training = recipe.data.open(pixels)
    if recipe.validation.source is not None:
        validation = open_source(recipe.validation.source, pixels, recipe.data.policy)
        validation.entries()  # what is wrong with it is told before a run begins
        return RunImages(pixels, training, None, validation, validation_indices(validation, None, limit))
    if not recipe.validation.fraction:  # nothing is held out: progress is watched on training images
        return RunImages(pixels, training, None, training, validation_indices(training, None, limit))
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
    return RunImages(pixels, training, kept, training, validation_indices(training, held_out, limit))


def _image_sizes(data: DataConfig, source: ImageSource, accelerator: Accelerator) -> np.ndarray | None:
    """(N, 2) widths and heights where batches go by shape: each process reads its share of the headers."""
    if data.aspect_buckets is None:
        return None
    count, index, total = len(source), accelerator.process_index, accelerator.num_processes
    rows = range(count * index // total, count * (index + 1) // total)
    part = image_sizes(
        source, data.policy, rows=rows, num_workers=data.num_workers, progress=accelerator.is_main_process
    )
    return np.concatenate(gather_object([part]))


def _agreed(finding: FindingT) -> FindingT:
    """What the first process found: another node may look at a shared folder as it was a moment ago."""
    found = [finding]
    if PartialState().num_processes > 1:
        broadcast_object_list(found)
    return found[0]


def refuse_strategies() -> None:
    """Raise a UserError where the launcher asks for anything but plain DDP."""
    for variable, name in REFUSED_STRATEGIES.items():
        if parse_flag_from_env(variable):
            raise _unsupported(name)


def _unsupported(strategy: str) -> UserError:
    return UserError(f"{strategy} is not supported: use plain DDP (distributed_type MULTI_GPU of accelerate config)")


def processes() -> PartialState:
    """Rank, device and number of processes. Only the first call decides: without the flag it would not find gloo."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
