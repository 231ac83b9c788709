"""RUN/best: the model of the validation that was best so far."""

import json
import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

from latentvae.checkpoint import save_model
from latentvae.errors import UserError
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.training.run_dir import METRICS_FILE, RunDirectory, saved_metrics

logger = logging.getLogger("latentvae")

Metric = Literal["psnr", "lpips", "none"]


class BestModel:
    """Compares validations by one metric and keeps the model of the best one.

    Args:
        metric: psnr (more is better), lpips (less is better), or none: there is no RUN/best.
        state: what `state()` gave when the checkpoint was made from which the run goes on. Without one, what RUN/best
            says of itself counts.
        has_lpips: whether validations of this run measure LPIPS.

    Attributes:
        value, images_seen: of the best validation; None before the first.

    Raises:
        UserError: lpips is asked for in a run that does not measure it.
    """

    def __init__(
        self, run: RunDirectory, metric: Metric, state: Mapping[str, Any] | None = None, *, has_lpips: bool = True
    ) -> None:
        if metric == "lpips" and not has_lpips:
            raise UserError(
                "training.best_metric is lpips, but no LPIPS is measured without loss.perceptual: "
                "give training.best_metric=psnr or none"
            )
        self.run, self.metric = run, metric
        on_disk = saved_metrics(run.best)
        known: Mapping[str, Any] = on_disk or {}
        if state is not None:  # RUN/best may be newer: a validation after the checkpoint, which will be repeated
            known = {metric: state.get("value"), "images_seen": state.get("images_seen")}
        if on_disk is None or (state is not None and state.get("metric", metric) != metric):
            known = {}  # a new folder, or values that another metric measured
        self.value: float | None = known.get(metric)
        self.images_seen: int | None = known.get("images_seen")

    def is_better(self, metrics: Mapping[str, float]) -> bool:
        """Whether these are the best so far. Not a number never is; a tie leaves the earlier model."""
        if self.metric == "none":
            return False
        value = metrics[self.metric]
        if not math.isfinite(value) or self.value is None:
            return math.isfinite(value)
        return value > self.value if self.metric == "psnr" else value < self.value

    def save(self, vae: AutoencoderKL, images_seen: int, metrics: Mapping[str, float]) -> None:
        """Write RUN/best and remember its value; for the first process, with the weights that were measured."""
        self.note(images_seen, metrics)
        text = json.dumps({"images_seen": images_seen} | dict(metrics), indent=2, allow_nan=False)
        save_model(vae, self.run.best, overwrite=True, files={METRICS_FILE: text + "\n"})
        logger.info("best so far: %s %.4g; saved %s", self.metric, metrics[self.metric], self.run.best)

    def note(self, images_seen: int, metrics: Mapping[str, float]) -> None:
        """Remember a best validation without writing: for the other processes."""
        self.value, self.images_seen = metrics[self.metric], images_seen

    def state(self) -> dict[str, Any]:
        """For state.json."""
        return {"metric": self.metric, "value": self.value, "images_seen": self.images_seen}
