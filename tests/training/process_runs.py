"""Trainings in processes of their own, as many as asked for, which begin at once and can be killed."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from latentvae.assembly import build
from latentvae.config import dump_yaml
from latentvae.errors import UserError
from latentvae.training.trainer import Trainer, TrainResult
from tests.training.recipes import tiny_recipe

GLOBAL_BATCH = 12  # divisible by 1, 2, 3 and 4 processes
WHOLE_STEP = (
    "training.parameter_dtype=float64",
    f"training.global_batch_size={GLOBAL_BATCH}",
    f"training.micro_batch_size={GLOBAL_BATCH}",  # one forward per process: the adaptive weight belongs to it
    f"training.total_images={5 * GLOBAL_BATCH}",
    "loss.discriminator_start=0",
    "loss.adversarial_start=0",
)  # five steps in float64 with all of the GAN at work from the first
FORK_SERVER = multiprocessing.get_context("forkserver" if os.name != "nt" else "spawn")
FORK_SERVER.set_forkserver_preload(["tests.training.process_runs"])  # a new process then takes no seconds of imports
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets


@dataclass(frozen=True)
class Launch:
    """The processes of one training; what process r writes to its standard error lies in `said`/r.txt."""

    processes: list[BaseProcess]
    said: Path

    def errors(self) -> str:
        """The end of what each process said."""
        return "\n".join(f"{path.name}: {path.read_text()[-3000:]}" for path in sorted(self.said.glob("*.txt")))

    def kill(self) -> None:
        """SIGKILL to all."""
        for process in self.processes:
            process.kill()
            process.join()

    def end(self, seconds: float = 240.0) -> list[int | None]:
        """Exit codes, once all have ended; where one fails, the others get ten seconds."""
        deadline = time.monotonic() + seconds
        while any(process.is_alive() for process in self.processes) and time.monotonic() < deadline:
            time.sleep(0.01)
            if any(process.exitcode not in (None, 0) for process in self.processes):
                deadline = min(deadline, time.monotonic() + 10)
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes

    def require_success(self) -> None:
        """Wait for all; an AssertionError with what they said where one failed."""
        codes = self.end()
        assert set(codes) == {0}, f"exit codes {codes}\n{self.errors()}"


def start(said: Path, count: int, target: Callable[..., Any], *arguments: Any) -> Launch:
    """Call `target(*arguments)` in `count` processes, in the surroundings that torchrun gives; in a plain one for 1."""
    said.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(count):
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
        environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        if count > 1:
            values = (rank, rank, count, count, "127.0.0.1", port)
            environment |= {name: str(value) for name, value in zip(LAUNCHER, values, strict=True)}
        process = FORK_SERVER.Process(target=_begin, args=(said / f"{rank}.txt", environment, target, arguments))
        process.start()
        processes.append(process)
    return Launch(processes, said)


def _begin(said: Path, environment: dict[str, str], target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    if os.name != "nt":
        multiprocessing.set_start_method("fork", force=True)  # as it is where nothing was said: not the test's own
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        target(*arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def trained(source: Path, out: Path, settings: tuple[str, ...], resume: str | None = None) -> TrainResult:
    """One process's part of the tiny recipe with `settings`; the weights it ends with go to `out`.<rank>."""
    return finish(build(tiny_recipe(source, *settings), out, resume=resume, progress=False), out)


def finish(trainer: Trainer, out: Path) -> TrainResult:
    """Train, and write the weights that this process ends with."""
    result = trainer.train()
    tensors = {
        f"{name}.{key}": value.contiguous()
        for name, network in trainer.networks.items()
        for key, value in network.module.state_dict().items()
    }
    save_file(tensors, weights_file(out, trainer.accelerator.process_index))
    return result


def trained_until(source: Path, out: Path, settings: tuple[str, ...], rank: int, images: int) -> None:
    """As `trained` with --resume auto, but process `rank` gets SIGTERM so that all stop after `images` images."""
    trainer = build(tiny_recipe(source, *settings), out, resume="auto", progress=False)
    update = trainer.updater.update

    def updated(batches: Any, images_seen: int, **options: Any) -> Any:
        last = images - 2 * trainer.config.global_batch_size  # a signal is seen at the beginning of the next step
        if images_seen == last and trainer.accelerator.process_index == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(batches, images_seen, **options)

    setattr(trainer.updater, "update", updated)  # noqa: B010
    result = finish(trainer, out)
    assert (result.images_seen, result.model_folder) == (images, None), result
    assert result.reason == ("SIGTERM" if trainer.accelerator.process_index == rank else "a signal"), result


def run(count: int, source: Path, out: Path, *settings: str, resume: str | None = None) -> Path:
    """Train with so many processes; returns `out`."""
    start(out.with_suffix(".said"), count, trained, source, out, settings, resume).require_success()
    return out


def weights_file(out: Path, rank: int) -> Path:
    """Where `finish` leaves the weights of one process."""
    return out.with_suffix(f".{rank}.safetensors")


def weights_of(out: Path, rank: int) -> dict[str, torch.Tensor]:
    """What process `rank` held in the end."""
    return load_file(weights_file(out, rank))


def newest(out: Path) -> Path:
    """The newest checkpoint of a run."""
    return max((path for path in (out / "checkpoints").iterdir() if path.name.isdigit()), key=lambda path: path.name)


def tensors_below(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder by file and name."""
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.relative_to(folder)}:{name}": t for file in files for name, t in load_file(file).items()}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Over all elements of all tensors, which must have the same names."""
    assert a and a.keys() == b.keys()
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def assert_bit_identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """The same names and bits; at least one tensor."""
    assert a and a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} tensors differ: {different[:3]}"


def recipe_file(path: Path, source: Path, *settings: str) -> Path:
    """The tiny recipe with these settings as a file, for the command line."""
    path.write_text(dump_yaml(tiny_recipe(source, *settings)), encoding="utf-8")
    return path


def end_family(process: int) -> None:
    """SIGKILL to a process that was started here and to all that it started."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process)
        for member in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
