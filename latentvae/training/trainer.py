"""The training loop: updates, and everything that happens between them."""

import logging
import math
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from latentvae.data.pipeline import Batch, UnreadableImages
from latentvae.images import PixelFormat
from latentvae.losses.objective import Objective
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.progress import ImageProgress
from latentvae.training.best import BestModel
from latentvae.training.checkpoints import compare_settings, load_checkpoint, read_state, save_checkpoint
from latentvae.training.config import TrainingConfig
from latentvae.training.drift import DriftReport
from latentvae.training.ema import ExponentialMovingAverage
from latentvae.training.measurements import Measurements
from latentvae.training.networks import trained_modules, with_optimizers
from latentvae.training.record import RunRecord
from latentvae.training.result import TrainResult
from latentvae.training.run_dir import RunDirectory
from latentvae.training.signals import StopSignals
from latentvae.training.starting import StartingModel
from latentvae.training.step import encoder_parts
from latentvae.training.update import NonFiniteLoss, Updater
from latentvae.training.validation import ValidationResult

logger = logging.getLogger("latentvae")


class Trainer:
    """Trains an autoencoder, with a discriminator where the objective has an adversarial term.

    `assembly.build` makes one from a recipe; the parts can also be put together by hand.

    Args:
        vae: in `config.parameter_dtype`.
        discriminator: needed where the objective has an adversarial term.
        batches: images already seen => an endless iterator with one item per optimizer step: this process's
            micro-batches.
        validate: model => its figures, latent statistics and picture on the validation images.
        pixels: what the batches hold.
        settings: the resolved recipe, for the trackers and the checkpoints.
        starting: what a fine-tune started from, whose scaling it keeps; None for a new model.
        drift: model => how far it is from `starting`.
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
        starting: StartingModel | None = None,
        drift: Callable[[AutoencoderKL], DriftReport] | None = None,
        resume: Path | None = None,
        progress: bool = True,
    ) -> None:
        self.config, self.accelerator, self.run = config, accelerator, run
        self.batches, self.unreadable, self.settings = batches, unreadable, settings
        self.starting, self.resume, self.vae = starting, resume, vae
        self.progress = progress and accelerator.is_main_process
        self._is_settled = False  # the encoder has its average, for `training.decoder_only_start`
        self.micro_batch: dict[str, int] = {}  # what `training.micro_batch_size` came to, for a resume
        state = read_state(resume) if resume is not None else {}
        self.images_seen: int = state.get("images_seen", 0)
        if resume is not None:
            compare_settings(resume, state, settings)
            if starting is not None:
                starting.require_same(state["starting"], settings["model"]["start_from"])
        modules = trained_modules(vae, discriminator, config, objective.config, accelerator.device)
        self.ema: ExponentialMovingAverage | None = None
        if config.ema_decay:
            self.ema = ExponentialMovingAverage(vae, config.ema_decay, config.ema_warmup_steps)
        self.networks = with_optimizers(modules, config)
        if resume is not None:
            load_checkpoint(resume, state, networks=self.networks, ema=self.ema, scaler=accelerator.scaler)
            logger.info("continuing from %s, after %d images", resume, self.images_seen)
        self.updater = Updater(
            config,
            accelerator,
            objective,
            self.networks,
            vae,
            pixels,
            anchor=starting if objective.config.anchor_weight else None,
            seconds_before=state.get("seconds", 0.0),
        )
        self.updater.num_nonfinite = state.get("num_nonfinite", 0)
        resolution = settings["validation"]["resolution"] or settings["data"]["resolution"]
        self.measured = Measurements(
            vae,
            self.ema,
            validate=validate,
            drift=drift,
            best=BestModel(run, config.best_metric, state.get("best"), has_lpips=objective.config.has_perceptual),
            run=run,
            accelerator=accelerator,
            measured_on={"validation_resolution": resolution},
            metrics=state.get("metrics", {}),
            validated_at=state.get("validated_at", self.images_seen),
        )
        if accelerator.is_main_process:
            run.drop_metrics_after(self.images_seen)

    def train(self) -> TrainResult:
        """Run until total_images, max_minutes or a signal; always leaves a checkpoint.

        A run that has finished already is left as it is.

        Raises:
            NonFiniteLoss: before the update that would have used it, where `training.on_nonfinite` does not say else.
            UserError: more unreadable files than `data.max_unreadable`.
        """
        done = self._finished_before()
        if done is not None:
            return done
        config = self.config
        with ExitStack() as stack:
            signals = stack.enter_context(StopSignals())
            record = stack.enter_context(
                RunRecord(self.run, self.accelerator, self.settings, images_seen=self.images_seen)
            )
            progress = stack.enter_context(
                ImageProgress(
                    "training",
                    config.total_images,
                    start=self.images_seen,
                    enabled=self.progress,
                    seconds_between_lines=math.inf,  # RunRecord says them
                )
            )
            reason = self._end()
            if reason is None and self.measured.is_due(self.images_seen, config.validate_every_images):
                self._validate(record, progress)  # the stop signal that ended the run before came in its place
            batches = stack.enter_context(closing(self.batches(self.images_seen)))
            while reason is None:
                before = self.images_seen
                micro_batches = next(batches)
                for batch in micro_batches:
                    self._note(batch.unreadable)
                record.add(self._update(micro_batches, stop=signals.received is not None))
                self.images_seen += config.global_batch_size
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
            if finished:
                self.measured.write_model(self.images_seen)
            record.end(self.images_seen, reason)
        model = self.run.model if finished else None
        return TrainResult(self.images_seen, reason, model, checkpoint, self.measured.metrics)

    def _finished_before(self) -> TrainResult | None:
        """The result of a run that had ended, with its model written, when it was resumed."""
        reason = self._end()
        if self.resume is None or reason is None:
            return None
        metrics = self.run.finished_model(self.images_seen)
        self.accelerator.wait_for_everyone()  # before one of them writes what another has yet to look at
        if metrics is None:
            return None
        logger.info(
            "this run has finished: %s after %d images; its model is %s. To train on, raise training.total_images or "
            "training.max_minutes",
            reason, self.images_seen, self.run.model,
        )  # fmt: skip
        return TrainResult(self.images_seen, reason, self.run.model, self.resume, metrics)

    def _update(self, micro_batches: list[Batch], *, stop: bool) -> dict[str, Tensor]:
        """One step with its average; where it is not finite, what `training.on_nonfinite` says."""
        start = self.config.decoder_only_start
        if self.ema is not None and start is not None and self.images_seen >= start and not self._is_settled:
            self.ema.settle(encoder_parts(self.vae))  # the decoder finishes on the encoder that is shipped
            self._is_settled = True
        try:
            terms = self.updater.update(micro_batches, self.images_seen, stop=stop)
        except NonFiniteLoss as error:
            if self.config.on_nonfinite != "rollback":
                raise
            self._roll_back(error)
            return {}
        if self.ema is not None and self.updater.trained_autoencoder and not self.updater.was_skipped:
            self.ema.update()
        return terms

    def _roll_back(self, error: NonFiniteLoss) -> None:
        """Go back to the weights of the newest checkpoint; the images that led here are not seen again."""
        found = [next(reversed(self.run.all_checkpoints()), self.resume)]
        broadcast_object_list(found)  # what the first process sees of a shared folder
        checkpoint = found[0]
        count = self.updater.num_nonfinite = self.updater.num_nonfinite + 1
        if checkpoint is None or count > self.config.max_nonfinite:
            raise error
        state, scaler = read_state(checkpoint), self.accelerator.scaler
        load_checkpoint(checkpoint, state, networks=self.networks, ema=self.ema, scaler=scaler)
        self._is_settled = False  # the checkpoint may be of a time when the encoder still trained
        logger.warning(
            "%s. Back to the weights of %s, and on with the next images (%d of at most %d times)",
            error, checkpoint, count, self.config.max_nonfinite,
        )  # fmt: skip

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
        total = self.config.total_images
        if self.config.max_minutes is not None:  # what the time budget lets expect
            total = min(total, round(self.images_seen / max(self.updater.progress(self.images_seen), 1e-9)))
        if is_first or self._is_due(before, self.config.log_every_images):
            speed = {"images_per_second": progress.images_per_second}
            terms = record.log_terms(self.images_seen, speed, total_images=total)
            figures = {name: terms[name] for name in ("reconstruction",) if name in terms}
        progress.update(self.images_seen, total=total, figures=figures)

    def _note(self, unreadable: list[tuple[str, str]]) -> None:
        """Count and name what could not be read, each image once; UserError beyond `data.max_unreadable`."""
        for key, why in self.unreadable.add(unreadable):
            logger.warning("skipped %s: %s", key, why)

    def _validate(self, record: RunRecord, progress: ImageProgress) -> None:
        result = self.measured.validated(self.images_seen)
        self._note(result.unreadable)
        record.log_validation(self.images_seen, result)
        progress.update(self.images_seen, figures=result.metrics)

    def _save(self, *, measure: bool = True) -> Path:
        """A checkpoint by the first process, while the others wait.

        `measure` False leaves the scaling of the last validation in it: who asked for a stop does not wait long.
        """
        folder = self.run.checkpoint(self.images_seen)
        accelerator, measured = self.accelerator, self.measured
        accelerator.wait_for_everyone()
        if measure and measured.needs_scaling and measured.measured_at != self.images_seen:
            self._note(measured.measure(self.images_seen).unreadable)
        if self.resume is not None and folder.resolve() == self.resume.resolve():
            if accelerator.is_main_process:
                self.run.prune(self.config.keep_checkpoints)  # which a crash may have left undone
            return folder  # nothing was trained since, and a replacement would not be one rename
        unreadable = gather_object(self.unreadable.items())  # each process knows of its share of the images
        if accelerator.is_main_process:
            save_checkpoint(folder, vae=self.vae, ema=self.ema, networks=self.networks, state=self._state())
            self.run.prune(self.config.keep_checkpoints)
            if unreadable:
                everywhere = UnreadableImages(limit=len(unreadable))
                everywhere.add(unreadable)
                everywhere.write_csv(self.run.unreadable)
            logger.info("saved %s", folder)
        accelerator.wait_for_everyone()
        return folder

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds besides tensors."""
        scaler = self.accelerator.scaler
        return {
            "images_seen": self.images_seen,
            "seconds": self.updater.seconds,
            "ema_updates": self.ema.num_updates if self.ema is not None else 0,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "num_nonfinite": self.updater.num_nonfinite,
            "best": self.measured.best.state(),
            "starting": self.starting.to_dict() if self.starting is not None else None,
            "micro_batch": self.micro_batch,
            "metrics": self.measured.metrics,
            "validated_at": self.measured.validated_at,
            "recipe": self.settings,
        }
