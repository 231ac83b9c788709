"""A bar with images/s and time left on a terminal, plain lines where there is none."""

import logging
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

logger = logging.getLogger("latentvae")


class ImageProgress:
    """Progress of long work, counted in images.

    Args:
        title: what is being done, one or two words.
        total: images until the end.
        start: images done before (a resumed run); they do not count for the rate.
        seconds_between_lines: how often a line is logged where there is no terminal.
        enabled: False shows nothing (every process but the first).
    """

    def __init__(
        self, title: str, total: int, *, start: int = 0, seconds_between_lines: float = 30.0, enabled: bool = True
    ) -> None:
        self.title, self.total, self.start, self.done = title, total, start, start
        self.enabled = enabled
        self.seconds_between_lines = seconds_between_lines
        self.figures: dict[str, str] = {}
        self._bar: Progress | None = None
        self._room = 0  # characters for the figures
        self._task: TaskID | None = None
        self._began = self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        self._began = self._last_line = time.monotonic()
        console = Console(stderr=True)
        if self.enabled and console.is_terminal:
            # rich would cut every column alike: on a narrow terminal the bar goes first, then the figures.
            is_wide = console.width >= 120
            self._room = max(0, console.width - 62 - 41 * is_wide)
            columns = (
                TextColumn("{task.description}"),
                *([BarColumn()] if is_wide else []),
                TextColumn("{task.completed}/{task.total} images, {task.fields[rate]:.1f}/s, left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.start, rate=0.0, figures="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @property
    def images_per_second(self) -> float:
        """Images since the start of this process per second of wall time."""
        return (self.done - self.start) / max(time.monotonic() - self._began, 1e-9)

    def update(self, done: int, *, total: int | None = None, figures: Mapping[str, float] | None = None) -> None:
        """`done` images are finished in all; `figures` are shown behind the bar until replaced."""
        self.done = done
        self.total = total if total is not None else self.total
        self.figures |= {name: f"{value:.4g}" for name, value in (figures or {}).items()}
        if not self.enabled:
            return
        shown = " ".join(f"{name} {value}" for name, value in self.figures.items())
        if self._bar is not None and self._task is not None:
            rate, cut = self.images_per_second, shown[: self._room]
            self._bar.update(self._task, completed=done, total=self.total, rate=rate, figures=cut)
            return
        now = time.monotonic()
        if now - self._last_line >= self.seconds_between_lines:
            self._last_line = now
            rate = self.images_per_second
            left = (self.total - done) / rate / 60 if rate > 0 else float("inf")
            logger.info(
                "%s: %d/%d images, %.1f images/s, %.1f min left %s", self.title, done, self.total, rate, left, shown
            )
