"""What is measured of a run's model, and what follows from it: scaling, RUN/best, RUN/model, drift."""

import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from accelerate import Accelerator

from latentvae.checkpoint import save_model
from latentvae.files import write_json
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.training.best import BestModel
from latentvae.training.drift import DriftReport
from latentvae.training.ema import ExponentialMovingAverage
from latentvae.training.lora import plain_model
from latentvae.training.run_dir import METRICS_FILE, RunDirectory
from latentvae.training.validation import ValidationResult

logger = logging.getLogger("latentvae")


class Measurements:
    """Measures the average of the weights where EMA is on, else the weights.

    Args:
        validate: model => its figures, latent statistics and picture on the validation images.
        drift: model => how far it is from what it started from; None for a new model, which has no such thing and whose
            scaling is measured. A fine-tune keeps the scaling that it has: diffusion models were trained on it.
        measured_on: what the figures are over, for metrics.json.
        metrics, validated_at: of the last validation, and images seen by then.

    Attributes:
        metrics, validated_at: of the last validation, and images seen by then.
        measured_at: images seen when the scaling in the model's config was measured; -1 where it was not.
    """

    def __init__(
        self,
        vae: AutoencoderKL,
        ema: ExponentialMovingAverage | None,
        *,
        validate: Callable[[AutoencoderKL], ValidationResult],
        drift: Callable[[AutoencoderKL], DriftReport] | None,
        best: BestModel,
        run: RunDirectory,
        accelerator: Accelerator,
        measured_on: dict[str, Any],
        metrics: dict[str, float],
        validated_at: int,
    ) -> None:
        self.vae, self.ema, self.best, self.run = vae, ema, best, run
        self._validate, self._drift, self._measured_on = validate, drift, measured_on
        self._is_main, self._wait = accelerator.is_main_process, accelerator.wait_for_everyone
        self.metrics, self.validated_at = metrics, validated_at
        self.measured_at = -1

    @property
    def needs_scaling(self) -> bool:
        """Whether the model's scaling is to be measured."""
        return self._drift is None

    def is_due(self, images_seen: int, every: int) -> bool:
        """Whether a validation was due at or before this point and never came."""
        return images_seen // every > self.validated_at // every

    def averaged(self) -> Any:
        """A context in which the model holds its average, where EMA is on."""
        return self.ema.applied() if self.ema is not None else nullcontext()

    def validated(self, images_seen: int) -> ValidationResult:
        """`measure` where a validation is due."""
        self.validated_at = images_seen
        return self.measure(images_seen)

    def measure(self, images_seen: int) -> ValidationResult:
        """Validate; a new model then says the scaling measured on it, and RUN/best follows. On every process."""
        with self.averaged():
            result = self._validate(self.vae)
            if self.needs_scaling:
                scaling = result.latents.scaling(has_shift=self.vae.config.shift_factor is not None)
                self.vae.register_to_config(**scaling)
                self.measured_at = images_seen
            self.metrics = result.metrics | self._measured_on | {"validation_images": result.num_images}
            if self.best.is_better(result.metrics):
                if self._is_main:
                    self.best.save(plain_model(self.vae), images_seen, self.metrics)
                else:
                    self.best.note(images_seen, self.metrics)
        return result

    def write_model(self, images_seen: int) -> None:
        """RUN/model: the finished model and its metrics; of a fine-tune also RUN/drift.json. On every process."""
        with self.averaged():
            if self._drift is not None:
                report = self._drift(self.vae)
                if self._is_main:
                    write_json(self.run.drift, {"images_seen": images_seen} | report.to_dict())
                for line in str(report).splitlines():
                    logger.info("%s", line)
            if self._is_main:
                metrics = json.dumps({"images_seen": images_seen} | self.metrics, indent=2, allow_nan=False)
                save_model(plain_model(self.vae), self.run.model, overwrite=True, files={METRICS_FILE: metrics + "\n"})
        self._wait()
