"""The training loop: updates, and everything that happens between them."""

import json
import logging
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from latentvae.checkpoint import save_model
from latentvae.data.pipeline import Batch, UnreadableImages
from latentvae.errors import UserError
from latentvae.images import PixelFormat
from latentvae.losses.objective import Objective
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.progress import ImageProgress
from latentvae.training.checkpoints import TrainedNetwork, load_checkpoint, load_weights, read_state, save_checkpoint
from latentvae.training.config import TrainingConfig
from latentvae.training.ema import ExponentialMovingAverage
from latentvae.training.optim import make_optimizer
from latentvae.training.record import RunRecord, changes
from latentvae.training.run_dir import RunDirectory
from latentvae.training.signals import StopSignals
from latentvae.training.update import Updater
from latentvae.training.validation import ValidationResult

logger = logging.getLogger("latentvae")


@dataclass(frozen=True)
class TrainResult:
    """How a call of `Trainer.train` ended.

    Attributes:
        images_seen: over the whole run.
        reason: finished (total_images), max_minutes, or the name of the signal that stopped it.
        model_folder: the finished model; None where a signal stopped the run before its end.
        checkpoint: the newest checkpoint.
        metrics: of the last validation.
    """

    images_seen: int
    reason: str
    model_folder: Path | None
    checkpoint: Path
    metrics: dict[str, float]


class Trainer:
    """Trains an autoencoder, with a discriminator where the objective has an adversarial term.

    `recipe.build` makes one from a recipe; the parts can also be put together by hand.

    Args:
        vae: in `config.parameter_dtype`.
        discriminator: needed where the objective has an adversarial term.
        batches: images already seen => an endless iterator with one item per optimizer step: this process's
            micro-batches.
        validate: model => its figures, latent statistics and picture on the validation images.
        pixels: what the batches hold.
        settings: the resolved recipe, for the trackers and the checkpoints.
        fine_tune: True leaves the scaling values of the model as they are; False writes measured ones.
        resume: a checkpoint folder to continue from.
    """

    def __init__(
        self,
        config: TrainingConfig,
        *,
        accelerator: Accelerator,
        vae: AutoencoderKL,
        objective: Objective,
        discriminator: nn.Module | None,
        batches: Callable[[int], Generator[list[Batch], None, None]],
        validate: Callable[[AutoencoderKL], ValidationResult],
        pixels: PixelFormat,
        unreadable: UnreadableImages,
        run: RunDirectory,
        settings: dict[str, Any],
        fine_tune: bool = False,
        resume: Path | None = None,
        progress: bool = True,
    ) -> None:
        self.config, self.accelerator, self.run = config, accelerator, run
        self.batches, self.validate, self.unreadable = batches, validate, unreadable
        self.settings, self.fine_tune, self.resume = settings, fine_tune, resume
        self.progress = progress and accelerator.is_main_process
        self.images_seen = 0
        self.metrics: dict[str, float] = {}
        state = read_state(resume) if resume is not None else {}
        self._measured_at = -1  # images_seen when the scaling in the model's config was measured

        modules: dict[str, nn.Module] = {"autoencoder": vae}
        if discriminator is not None:
            modules["discriminator"] = discriminator
        for module in modules.values():
            module.to(accelerator.device)
            if config.channels_last:
                module.to(memory_format=torch.channels_last)
        if config.gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        if config.trainable == "decoder":
            for part in (vae.encoder, vae.quant_conv):
                if part is not None:
                    part.requires_grad_(False)
        if resume is not None:
            self._compare_settings(resume, state)
            load_weights(resume / "model", vae)
        self.vae = vae
        self.ema: ExponentialMovingAverage | None = None
        if config.ema_decay:
            self.ema = ExponentialMovingAverage(vae, config.ema_decay, config.ema_warmup_steps)
        self.networks = {
            name: TrainedNetwork(
                module,
                make_optimizer(
                    module.named_parameters(),
                    learning_rate=config.learning_rate,
                    betas=config.betas,
                    weight_decay=config.weight_decay,
                ),
            )
            for name, module in modules.items()
        }
        if resume is not None:
            load_checkpoint(resume, state, networks=self.networks, ema=self.ema)
        self.updater = Updater(
            config, accelerator, objective, self.networks, vae, pixels, seconds_before=state.get("seconds", 0.0)
        )
        if resume is not None:
            self._restore(resume, state)
        if accelerator.is_main_process:
            run.drop_metrics_after(self.images_seen)

    def _compare_settings(self, resume: Path, state: dict[str, Any]) -> None:
        """Say what changed since the checkpoint was made; another model is refused."""
        changed = sorted(changes(state["recipe"], self.settings))
        architecture = [line for line in changed if line.startswith("model.")]
        if architecture:
            raise UserError(f"{resume} was made with another model: {'; '.join(architecture)}; use another --out")
        for line in changed:
            logger.warning("changed since the checkpoint: %s", line)

    def _restore(self, resume: Path, state: dict[str, Any]) -> None:
        self.images_seen, self.metrics = state["images_seen"], state["metrics"]
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        logger.info("continuing from %s, after %d images", resume, self.images_seen)

    def train(self) -> TrainResult:
        """Run until total_images, max_minutes or a signal; always leaves a checkpoint.

        Raises:
            NonFiniteLoss: before the update that would have used it.
            UserError: more unreadable files than `data.max_unreadable`.
        """
        config = self.config
        with ExitStack() as stack:
            signals = stack.enter_context(StopSignals())
            record = stack.enter_context(RunRecord(self.run, self.accelerator, self.settings))
            progress = stack.enter_context(
                ImageProgress("training", config.total_images, start=self.images_seen, enabled=self.progress)
            )
            reason = self._end()
            batches = stack.enter_context(closing(self.batches(self.images_seen)))
            while reason is None:
                before = self.images_seen
                micro_batches = next(batches)
                for batch in micro_batches:
                    self._note(batch.unreadable)
                record.add(self.updater.update(micro_batches, before, stop=signals.received is not None))
                self.images_seen += config.global_batch_size
                if self.ema is not None and not self.updater.was_skipped:
                    self.ema.update()
                self._report(before, record, progress)
                reason = self._end() or ((signals.received or "a signal") if self.updater.stop_agreed else None)
                if reason is None and self._is_due(before, config.validate_every_images):
                    self._validate(record, progress)
                if reason is None and self._is_due(before, config.save_every_images):
                    self._save()
            batches.close()  # ends the worker processes before the last validation starts its own
            finished = reason in ("finished", "max_minutes")
            if finished:
                self._validate(record, progress)
            checkpoint = self._save(measure=finished)
            model_folder = self._write_model() if finished else None
            logger.info("%s after %d images", reason, self.images_seen)
        return TrainResult(self.images_seen, reason, model_folder, checkpoint, self.metrics)

    def _end(self) -> str | None:
        """Why the run is over, from what all processes agree on; None while it is not."""
        if self.images_seen >= self.config.total_images:
            return "finished"
        return "max_minutes" if self.updater.progress(self.images_seen) >= 1 else None

    def _is_due(self, before: int, every: int) -> bool:
        return self.images_seen // every > before // every

    def _report(self, before: int, record: RunRecord, progress: ImageProgress) -> None:
        is_first = before == progress.start
        figures = {}
        if is_first or self._is_due(before, self.config.log_every_images):
            terms = record.log_terms(self.images_seen, {"images_per_second": progress.images_per_second})
            figures = {"reconstruction": terms["reconstruction"]}
        total = self.config.total_images
        if self.config.max_minutes is not None:  # what the time budget lets expect
            total = min(total, round(self.images_seen / max(self.updater.progress(self.images_seen), 1e-9)))
        progress.update(self.images_seen, total=total, figures=figures)

    def _note(self, unreadable: list[tuple[str, str]]) -> None:
        """Count and name what could not be read, each image once; UserError beyond `data.max_unreadable`."""
        for key, why in self.unreadable.add(unreadable):
            logger.warning("skipped %s: %s", key, why)

    def _averaged(self) -> Any:
        """A context in which the model holds its average, where EMA is on."""
        return self.ema.applied() if self.ema is not None else nullcontext()

    def _validate(self, record: RunRecord, progress: ImageProgress) -> None:
        result = self._measure()
        resolution = self.settings["validation"]["resolution"] or self.settings["data"]["resolution"]
        measured_on = {"validation_images": result.num_images, "validation_resolution": resolution}
        self.metrics = result.metrics | measured_on
        record.log_validation(self.images_seen, result)
        progress.update(self.images_seen, figures=result.metrics)

    def _measure(self) -> ValidationResult:
        """Validate the average. A new model then says the scaling measured on it; a fine-tune keeps what it has."""
        with self._averaged():
            result = self.validate(self.vae)
        self._note(result.unreadable)
        if not self.fine_tune:
            scaling = result.latents.scaling(has_shift=self.vae.config.shift_factor is not None)
            self.vae.register_to_config(**scaling)
            self._measured_at = self.images_seen
        return result

    def _save(self, *, measure: bool = True) -> Path:
        """A checkpoint by the first process, while the others wait.

        `measure` False leaves the scaling of the last validation in it: who asked for a stop does not wait long.
        """
        folder = self.run.checkpoint(self.images_seen)
        accelerator = self.accelerator
        accelerator.wait_for_everyone()
        if measure and not self.fine_tune and self._measured_at != self.images_seen:
            self._measure()
        if self.resume is not None and folder.resolve() == self.resume.resolve():
            return folder  # nothing was trained since, and a replacement would not be one rename
        if accelerator.is_main_process:
            state = {
                "images_seen": self.images_seen,
                "seconds": self.updater.seconds,
                "ema_updates": self.ema.num_updates if self.ema is not None else 0,
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
                "metrics": self.metrics,
                "recipe": self.settings,
            }
            save_checkpoint(folder, vae=self.vae, ema=self.ema, networks=self.networks, state=state)
            self.run.prune(self.config.keep_checkpoints)
            if self.unreadable.count:
                self.unreadable.write_csv(self.run.unreadable)
            logger.info("saved %s", folder)
        accelerator.wait_for_everyone()
        return folder

    def _write_model(self) -> Path:
        """RUN/model: the finished model and its metrics."""
        if self.accelerator.is_main_process:
            metrics = json.dumps({"images_seen": self.images_seen} | self.metrics, indent=2, allow_nan=False)
            with self._averaged():
                save_model(self.vae, self.run.model, overwrite=True, files={"metrics.json": metrics + "\n"})
        self.accelerator.wait_for_everyone()
        return self.run.model
