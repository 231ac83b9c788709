"""How many images a forward may have: tried on the device, since no formula knows its kernels."""

import ctypes
import gc
import os
import statistics
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from latentvae.errors import UserError

CUDA_SHARE = 0.9  # of a GPU's memory: the allocator leaves gaps
CPU_SHARE = 0.5  # of what is free: the workers that read images and the rest of the machine live there too
TRIALS = 3  # of each size, where memory is that of the whole process: the system takes and gives some at any time
SAMPLE_SECONDS = 0.002  # between two looks at a process's memory
PROC = Path("/proc/self")


def largest_micro_batch(
    step_of_size: Callable[[int], None], per_process: int, device: torch.device, *, to_come: int = 0
) -> int:
    """The largest divisor of `per_process` images that fits; the smallest such answer of all processes, on each.

    On CUDA the divisors are tried upwards until one runs out of memory or takes more than 90 percent of it. Elsewhere
    sizes 1 and 2 are tried, three times each, and larger ones follow from the difference; half of the memory that is
    free may be taken.

    Args:
        step_of_size: runs a forward and backward of so many images, changes nothing, and leaves nothing behind.
        to_come: bytes that training will need besides, such as optimizer states that the first step makes.

    Raises:
        UserError: on every process, where one image does not fit on one of them.
    """
    sizes = [size for size in range(1, per_process + 1) if per_process % size == 0]
    if device.type == "cuda":
        fits = _fits_on_cuda(step_of_size, sizes, device, to_come)
    else:
        fits = _fits_in_ram(step_of_size, sizes, to_come)
    agreed = min(gather_object([fits]))
    if agreed == 0:
        raise UserError(
            f"training.micro_batch_size=auto: not even one image fits into the memory of {device}: lower "
            "data.resolution, set training.gradient_checkpointing=true, or take a smaller model"
        )
    return agreed


def optimizer_bytes_to_come(optimizers: Iterable[torch.optim.Optimizer]) -> int:
    """What AdamW will allocate at its first step: two moments of each parameter that has no state yet."""
    return sum(
        2 * parameter.numel() * parameter.element_size()
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if not optimizer.state.get(parameter)
    )


def _fits_on_cuda(step_of_size: Callable[[int], None], sizes: list[int], device: torch.device, to_come: int) -> int:
    """The largest of `sizes` (ascending) that fits; 0 where none does."""
    fits = 0
    for size in sizes:
        _release()
        free, _ = torch.cuda.mem_get_info(device)
        room = CUDA_SHARE * (free + torch.cuda.memory_reserved(device)) - to_come
        torch.cuda.reset_peak_memory_stats(device)
        try:
            step_of_size(size)
            torch.cuda.synchronize(device)
        except torch.OutOfMemoryError:
            break
        if torch.cuda.max_memory_allocated(device) > room:
            break
        fits = size
    _release()
    return fits


def _fits_in_ram(step_of_size: Callable[[int], None], sizes: list[int], to_come: int) -> int:
    """As `_fits_on_cuda`, from what one and two images take of the process's memory."""
    if sizes == [1]:
        return 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", PartialState().num_processes))  # they share the machine
    gc.collect()
    room = CPU_SHARE * psutil.virtual_memory().available / processes - to_come
    step_of_size(1)  # what is made once, such as compiled kernels, is not counted
    growth: dict[int, list[int]] = {1: [], 2: []}
    for _ in range(TRIALS):
        for size, measured in growth.items():
            with PeakMemory() as peak:
                step_of_size(size)
            measured.append(peak.growth)
    return largest_within(room, statistics.median(growth[1]), statistics.median(growth[2]), sizes)


def largest_within(room: float, one: float, two: float, sizes: list[int]) -> int:
    """The largest of `sizes` whose need, on the line through those of one and two images, stays within `room`; or 0.

    The line rises by at least a quarter of what two images need: a peak that fell between two looks must not make all
    further images free.
    """
    each = max(two - one, two / 4)
    return max((size for size in sizes if one + (size - 1) * each <= room), default=0)


class PeakMemory:
    """Watches the memory of this process within a block. `growth`: bytes by which it rose at most.

    Linux keeps the highest mark itself and lets a process reset it, so nothing is missed. Where that is not to be had
    the memory is looked at every two milliseconds, and a shorter peak may be missed.
    """

    def __init__(self) -> None:
        self.growth = 0
        self._process = psutil.Process()
        self._done = threading.Event()
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> Self:
        _give_back_free_memory()
        self._start = self._process.memory_info().rss
        if not _reset_highest_mark():
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watcher is None:
            self.growth = max(0, _highest_mark() - self._start)
        else:
            self._done.set()
            self._watcher.join()

    def _watch(self) -> None:
        while True:
            self.growth = max(self.growth, self._process.memory_info().rss - self._start)
            if self._done.wait(SAMPLE_SECONDS):
                return


def _give_back_free_memory() -> None:
    """What was freed before may still belong to the process, and would be taken again without a trace."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None  # glibc has it
    if trim is not None:
        trim(0)


def _reset_highest_mark() -> bool:
    """Sets the mark to the memory held now; False where the system does not offer it (proc(5), clear_refs)."""
    try:
        (PROC / "clear_refs").write_text("5")
        return _highest_mark() > 0
    except (OSError, ValueError):
        return False


def _highest_mark() -> int:
    """Bytes of memory this process held at most since the mark was last reset; 0 where the system does not say."""
    for line in (PROC / "status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _release() -> None:
    gc.collect()
    torch.cuda.empty_cache()
