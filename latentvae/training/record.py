"""What a run writes down while it goes: log file, metrics.jsonl, trackers, pictures."""

import logging
from types import TracebackType
from typing import Any, Self

import torch
from accelerate import Accelerator
from torch import Tensor

from latentvae.config import flatten
from latentvae.images import PixelFormat, save_image
from latentvae.training.run_dir import RunDirectory
from latentvae.training.validation import ValidationResult

logger = logging.getLogger("latentvae")


class RunRecord:
    """Collects the terms of each step and writes their means; only the first process writes.

    Args:
        settings: the recipe as nested dicts, for the trackers; lists become text, since TensorBoard refuses them.
    """

    def __init__(self, run: RunDirectory, accelerator: Accelerator, settings: dict[str, Any]) -> None:
        self.run, self.accelerator, self.settings = run, accelerator, settings
        self.is_main = accelerator.is_main_process
        self._steps: list[dict[str, Tensor]] = []
        self._handler: logging.Handler | None = None

    def __enter__(self) -> Self:
        if self.is_main:
            self._handler = logging.FileHandler(self.run.log, encoding="utf-8")
            self._handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
            logger.addHandler(self._handler)
        if self.accelerator.log_with:
            flat = flatten(self.settings)
            plain = {n: v if isinstance(v, bool | int | float | str) else str(v) for n, v in flat.items()}
            self.accelerator.init_trackers("latentvae", config=plain)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and self._handler is not None:  # in the file alone: whoever catches it says it elsewhere
            message = f"{kind.__name__}: {error}"
            self._handler.handle(logging.LogRecord(logger.name, logging.ERROR, __file__, 0, message, (), None))
        if self.accelerator.log_with:
            self.accelerator.end_training()
        if self._handler is not None:
            logger.removeHandler(self._handler)
            self._handler.close()

    def add(self, terms: dict[str, Tensor]) -> None:
        """Keep the scalar figures of one optimizer step; nothing is read from the device yet."""
        self._steps.append(terms)

    def log_terms(self, images_seen: int, extra: dict[str, float]) -> dict[str, float]:
        """Write the means since the last call, over this process's images; returns them."""
        names = list(dict.fromkeys(name for step in self._steps for name in step))
        means = {name: torch.stack([s[name].float() for s in self._steps if name in s]).mean() for name in names}
        figures = {name: float(value) for name, value in means.items()} | extra
        self._steps.clear()
        if self.is_main:
            self.run.append_metrics({"images_seen": images_seen} | figures)
        self.accelerator.log({f"train/{name}": value for name, value in figures.items()}, step=images_seen)
        return figures

    def log_validation(self, images_seen: int, result: ValidationResult) -> None:
        """Write the figures, the latents' statistics and the picture of one validation."""
        if not self.is_main:
            return
        figures = dict(result.metrics) | {"latent_mean": result.latents.mean, "latent_std": result.latents.std}
        row = {f"validation_{name}": value for name, value in figures.items()}
        self.run.append_metrics({"images_seen": images_seen} | row)
        self.accelerator.log({f"validation/{name}": value for name, value in figures.items()}, step=images_seen)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
        logger.info("validation after %d images: %s", images_seen, shown)
        if result.picture is not None:
            self.run.samples.mkdir(exist_ok=True)
            save_image(
                result.picture,
                self.run.samples / f"{images_seen:09d}.png",
                PixelFormat(channels=result.picture.shape[-1]),
            )
            for tracker in self.accelerator.trackers:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                if tracker.name in ("tensorboard", "wandb"):
                    tracker.log_images({"validation/reconstructions": result.picture[None]}, images_seen, **layout)


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`dotted.name: old -> new` for every setting that differs."""
    before, now = flatten(before), flatten(now)
    names = list(dict.fromkeys([*before, *now]))
    return [f"{name}: {before.get(name)} -> {now.get(name)}" for name in names if before.get(name) != now.get(name)]
