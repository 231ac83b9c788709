"""Which process of a launch this is, and its device: `accelerate launch` and `torchrun` say so in the environment."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from latentvae.errors import UserError

PLANNING = timedelta(days=1)  # that the other processes wait for the first one to list and plan a large source


@dataclass(frozen=True)
class Launch:
    """One process among those that were started together; alone where nothing says otherwise."""

    device: torch.device
    index: int = 0
    count: int = 1

    @classmethod
    def alone(cls, device: str | None) -> "Launch":
        """This process by itself: whatever was started with it is not waited for."""
        return cls(_device(device))

    @classmethod
    def current(cls, device: str | None) -> "Launch":
        """From the environment. `device`: such as cuda:1; None: the accelerator where there is one, else the CPU."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls.alone(device)
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or device == "cpu", timeout=PLANNING)
        if device not in (None, "cpu"):
            raise UserError(f"device {device!r} is for one process; {count} were started, and each gets its own")
        return cls(state.device, state.process_index, state.num_processes)

    @property
    def is_main(self) -> bool:
        """The first process: it plans and shows progress."""
        return self.index == 0

    def wait(self) -> None:
        """Until all processes are here. Called once, before the work: nothing in it waits for another process."""
        if self.count > 1:
            PartialState().wait_for_everyone()


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return torch.device(name)
