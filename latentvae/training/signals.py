"""Stop between two steps, not in the middle of one."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self


class StopSignals:
    """While entered, SIGTERM, SIGINT and (where it exists) SIGUSR1 set `received` instead of ending the process.

    A second SIGINT interrupts at once. Outside the main thread signals cannot be caught and nothing happens.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            names = [name for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
            for number in (getattr(signal, name) for name in names):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if callable(handler) or isinstance(handler, int) else signal.SIG_DFL)
        self._before.clear()
