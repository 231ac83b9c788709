"""What a run writes down while it goes: log file, metrics.jsonl, status, trackers, pictures, warnings."""

import logging
import math
import os
import socket
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Self

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from torch import Tensor

from latentvae.config import flatten
from latentvae.errors import one_line
from latentvae.files import write_json
from latentvae.images import PixelFormat, save_image
from latentvae.training.monitor import CollapseMonitor
from latentvae.training.run_dir import RunDirectory
from latentvae.training.validation import ValidationResult
from latentvae.training.wording import main_figures, progress_line, size

logger = logging.getLogger("latentvae")

SECONDS_BETWEEN_STATUS = 10.0  # status.json is flushed to disk each time
SECONDS_BETWEEN_CURVES = 120.0  # drawing takes one or two, while all processes wait; the end always has a picture


class RunRecord:
    """Collects the terms of each step and writes their means; only the first process writes.

    Args:
        settings: the recipe as nested dicts, for the trackers (lists become text, since TensorBoard refuses them) and
            for the monitor.
        images_seen: by the run so far; where it is not 0, the start is marked as a resume.
    """

    def __init__(
        self, run: RunDirectory, accelerator: Accelerator, settings: dict[str, Any], *, images_seen: int = 0
    ) -> None:
        self.run, self.accelerator, self.settings, self.images_seen = run, accelerator, settings, images_seen
        self.is_main = accelerator.is_main_process
        self.monitor = CollapseMonitor(settings)
        self._steps: list[dict[str, Tensor]] = []
        self._handler: logging.Handler | None = None
        self._began = _now()
        self._status_at = self._curves_at = time.monotonic()
        self._reason = "ended"
        self._total_images: int | None = None  # that the run is expected to reach
        self._is_drawn = True

    def __enter__(self) -> Self:
        if self.is_main:
            self._handler = logging.FileHandler(self.run.log, encoding="utf-8")
            self._handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
            logger.addHandler(self._handler)
            self.monitor = CollapseMonitor.replayed(self.settings, self.run.read_metrics())
            if self.images_seen:
                self._append({"event": "resumed"})
            self._write_status("running")
        if self.accelerator.log_with:
            flat = flatten(self.settings)
            plain = {n: v if isinstance(v, bool | int | float | str) else str(v) for n, v in flat.items()}
            self.accelerator.init_trackers("latentvae", config=plain)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handler is not None:
            if kind is not None:  # in the file alone: whoever catches it says it elsewhere
                message = f"{kind.__name__}: {error}"
                self._handler.handle(logging.LogRecord(logger.name, logging.ERROR, __file__, 0, message, (), None))
            if kind is None or issubclass(kind, Exception):
                self._draw()
            reason = self._reason if kind is None else f"{kind.__name__}: {one_line(error)}"
            self._write_status("ended" if kind is None else "failed", reason)
        if self.accelerator.log_with:
            self.accelerator.end_training()
        if self._handler is not None:
            logger.removeHandler(self._handler)
            self._handler.close()

    def end(self, images_seen: int, reason: str) -> None:
        """Say why the run is over: finished, max_minutes, or the name of a signal."""
        self.images_seen, self._reason = images_seen, reason
        logger.info("%s after %d images", reason, images_seen)

    def add(self, terms: dict[str, Tensor]) -> None:
        """Keep the scalar figures of one optimizer step; nothing is read from the device yet."""
        self._steps.append(terms)

    def log_terms(
        self, images_seen: int, extra: Mapping[str, float] | None = None, *, total_images: int | None = None
    ) -> dict[str, float]:
        """Write the means since the last call, over the images of all processes; returns them. All processes call it.

        A value that is not finite (a gradient norm of a step that the fp16 scaler skipped) is left out of its mean.

        Args:
            extra: figures that are written as they are; `images_per_second` is among them where it is known.
            total_images: when the run is expected to end; None: at training.total_images.
        """
        figures = self._means() | dict(extra or {})
        rate = figures.get("images_per_second", 0.0)
        if not rate:  # before the second step nothing is known of it
            figures.pop("images_per_second", None)
        self.images_seen = images_seen
        self.accelerator.log({f"train/{name}": value for name, value in figures.items()}, step=images_seen)
        if self.is_main:
            self._append(figures)
            total = self._total_images = total_images or self.settings["training"]["total_images"]
            speed = f", {rate:.3g} images/s" if rate else ""
            line = f"{progress_line(images_seen, total, rate)}{speed}, {size(figures['memory_bytes'])}"
            logger.info("%s: %s", line, main_figures(figures))
            self._warn(figures)
            if time.monotonic() - self._status_at > SECONDS_BETWEEN_STATUS:
                self._write_status("running")
        return figures

    def log_validation(self, images_seen: int, result: ValidationResult) -> None:
        """Write the figures, the latents' statistics and the picture of one validation."""
        if not self.is_main:
            return
        self.images_seen = images_seen
        latents = result.latents
        figures = dict(result.metrics) | {"latent_mean": latents.mean, "latent_std": latents.std}
        if latents.channel_mean:
            figures["latent_channels"] = len(latents.channel_mean)
        row = {f"validation_{name}": value for name, value in figures.items()}
        channels = {"channel_mean": list(latents.channel_mean), "channel_std": list(latents.channel_std)}
        self._append(row | {f"validation_{name}": values for name, values in channels.items() if values})
        self.accelerator.log({f"validation/{name}": value for name, value in figures.items()}, step=images_seen)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
        logger.info("validation after %d images: %s", images_seen, shown)
        self._warn(row)
        if result.picture is not None:
            self.run.samples.mkdir(exist_ok=True)
            save_image(
                result.picture,
                self.run.samples / f"{images_seen:09d}.png",
                PixelFormat(channels=result.picture.shape[-1]),
            )
            self._show("validation/reconstructions", result.picture)
        if time.monotonic() - self._curves_at > SECONDS_BETWEEN_CURVES:
            self._draw()

    def _means(self) -> dict[str, float]:
        """Of each figure over steps and processes, and the memory of the process that needs most; one exchange."""
        names = list(dict.fromkeys(name for step in self._steps for name in step))
        device = self.accelerator.device
        wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has nothing wider
        sums = []
        for name in names:
            values = torch.stack([step[name].detach() for step in self._steps if name in step]).to(device, wide)
            finite = values.isfinite()
            sums.append(torch.stack([values.where(finite, 0).sum(), finite.sum().to(wide)]))
        memory = torch.tensor([[_memory_bytes(device), 0]], dtype=wide, device=device)
        table = torch.cat([torch.stack(sums), memory] if sums else [memory])  # (figures + 1, 2)
        self._steps.clear()
        everywhere = self.accelerator.gather(table[None]).tolist()  # (processes, figures + 1, 2)
        figures: dict[str, float] = {}
        for index, name in enumerate(names):
            total, count = (math.fsum(process[index][column] for process in everywhere) for column in (0, 1))
            if count:
                figures[name] = total / count
        return figures | {"memory_bytes": int(max(process[-1][0] for process in everywhere))}

    def _append(self, figures: Mapping[str, Any]) -> None:
        self.run.append_metrics({"images_seen": self.images_seen, **figures})
        self._is_drawn = False

    def _warn(self, figures: Mapping[str, Any]) -> None:
        for warning in self.monitor.observe({"images_seen": self.images_seen, **figures}):
            logger.warning("warning after %d images: %s", self.images_seen, warning)

    def _draw(self) -> None:
        """RUN/curves.png, and the same in the trackers. A picture that fails must not end the run that it shows."""
        if self._is_drawn:
            return
        try:
            from latentvae.training.curves import draw_run, pixels_of

            picture = pixels_of(draw_run(self.run))
            save_image(picture, self.run.curves, PixelFormat())
            self._show("curves", picture)
        except Exception as error:
            logger.warning("%s could not be drawn: %s: %s", self.run.curves, type(error).__name__, one_line(error))
        self._curves_at, self._is_drawn = time.monotonic(), True

    def _show(self, name: str, picture: np.ndarray) -> None:
        """An HWC image in those trackers that take images."""
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            if tracker.name in ("tensorboard", "wandb"):
                tracker.log_images({name: picture[None]}, self.images_seen, **layout)

    def _write_status(self, state: str, reason: str | None = None) -> None:
        """Who trains here, and since when; at the end, how it ended. A killed run leaves `running` behind."""
        process = psutil.Process()
        status = {
            "state": state,
            "reason": reason,
            "images_seen": self.images_seen,
            "expected_images": self._total_images,  # fewer than total_images where max_minutes comes first
            "host": socket.gethostname(),
            "process": os.getpid(),
            "process_started": process.create_time(),  # another process may have the number by and by
            "num_processes": self.accelerator.num_processes,
            "began": self._began,
            "written": _now(),
        }
        write_json(self.run.status, status)
        self._status_at = time.monotonic()


def _memory_bytes(device: torch.device) -> int:
    """The most that tensors took on a GPU so far; elsewhere what the process has in memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`dotted.name: old -> new` for every setting that differs."""
    before, now = flatten(before), flatten(now)
    names = list(dict.fromkeys([*before, *now]))
    return [f"{name}: {before.get(name)} -> {now.get(name)}" for name in names if before.get(name) != now.get(name)]
