"""The folder of a run: what lies where, and how a run is found again.

RUN/recipe.yaml                 the fully resolved recipe
RUN/environment.json            versions, commit, hardware
RUN/status.json                 whether it runs, where and since when, or how it ended
RUN/log.txt                     what the run said
RUN/metrics.jsonl               one JSON object per log interval, validation or resume
RUN/curves.png                  the same as a picture
RUN/unreadable.csv              files that could not be used, and why
RUN/samples/<images_seen>.png   originals above reconstructions
RUN/tensorboard/                and what other trackers write
RUN/checkpoints/<images_seen>/  everything that resume needs (see checkpoints.py)
RUN/drift.json                  how far fine-tuning moved the latents, at its end
RUN/best/                       the model of the best validation so far, a diffusers folder with its metrics.json
RUN/model/                      the finished model, likewise (the EMA where it is on)
RUN/drift.json                  of a fine-tune: how far that is from what it started from

Nothing here imports torch until a run begins: `latentvae info` reads the same folder.
"""

import json
import os
import platform
import shutil
import socket
import struct
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel

from latentvae.config import load_config
from latentvae.errors import UserError, one_line
from latentvae.files import TEMPORARY_MARK, check_writable, write_json, write_text

METRICS_FILE = "metrics.json"  # beside the weights of RUN/model and RUN/best
STATE_FILE = "state.json"  # written last in a checkpoint folder, which is itself renamed into place when whole


class _AnySettings(BaseModel, extra="allow"):
    """A recipe without the classes that know its fields: they import torch, and an older one may have others."""


class RunDirectory:
    """Paths and small files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.environment = self.path / "environment.json"
        self.status = self.path / "status.json"
        self.log = self.path / "log.txt"
        self.metrics = self.path / "metrics.jsonl"
        self.curves = self.path / "curves.png"
        self.unreadable = self.path / "unreadable.csv"
        self.samples = self.path / "samples"
        self.checkpoints = self.path / "checkpoints"
        self.best = self.path / "best"
        self.drift = self.path / "drift.json"
        self.model = self.path / "model"

    def find_checkpoint(self, resume: str | Path | None) -> Path | None:
        """The checkpoint to continue from.

        Args:
            resume: None starts a new run, "auto" takes the newest checkpoint of this folder (None where there is none
                yet: a job that is started again and again begins with no checkpoint), a path takes that one.

        Raises:
            UserError: a new run in a folder that holds one, a checkpoint that is damaged (an older one is never taken
                in its place unasked), a path that is not a checkpoint, or a path while this folder has newer ones:
                they would pass for what follows it.
        """
        if resume is None:
            if self.recipe.exists() or self.all_checkpoints():
                raise UserError(f"{self.path} holds a run already: pass --resume auto to continue it, or another --out")
            return None
        if str(resume) == "auto":
            found = self.all_checkpoints()
            if found and (reason := damage(found[-1])):
                before = f"continue from {found[-2].name}" if len(found) > 1 else "start the run again"
                raise UserError(f"{found[-1]} is damaged: {reason}; delete it to {before}")
            return found[-1] if found else None
        if not (Path(resume) / STATE_FILE).is_file():
            near = ", ".join(str(path) for path in self.all_checkpoints()) or "none"
            raise UserError(f"{resume} is not a checkpoint (no {STATE_FILE} in it); checkpoints of this run: {near}")
        own = self.all_checkpoints()
        if own and own[-1].resolve() != Path(resume).resolve():
            raise UserError(
                f"{self.path} holds the checkpoint {own[-1].name}, which does not follow from {resume}: choose another "
                "--out, or remove the later checkpoints"
            )
        return Path(resume)

    def all_checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        found = [path for path in self.checkpoints.iterdir() if path.name.isdigit() and (path / STATE_FILE).is_file()]
        return sorted(found, key=lambda path: int(path.name))

    def checkpoint(self, images_seen: int) -> Path:
        """Where the checkpoint after this many images lies."""
        return self.checkpoints / f"{images_seen:09d}"

    def prune(self, keep: int) -> None:
        """Delete all but the `keep` newest checkpoints, and what an interrupted save left behind."""
        for path in self.all_checkpoints()[:-keep]:
            os.rename(path, path.with_name(f".{path.name}{TEMPORARY_MARK}old"))  # never half a checkpoint by its name
        for path in self.checkpoints.glob(f".*{TEMPORARY_MARK}*"):
            shutil.rmtree(path, ignore_errors=True)

    def recover(self) -> None:
        """Put back a model that a crash left beside its place, and clear what else it left there.

        A folder is replaced by two renames: between them there is none by its name, but the old and the new one are
        both whole beside it. The newer is taken.
        """
        for place in (self.best, self.model):
            beside = [path for path in place.parent.glob(f".{place.name}{TEMPORARY_MARK}*") if path.is_dir()]
            whole = [path for path in beside if saved_metrics(path) is not None and damage(path) is None]
            if whole and not place.exists():
                os.rename(max(whole, key=lambda path: (saved_metrics(path) or {})["images_seen"]), place)
            for path in beside:
                shutil.rmtree(path, ignore_errors=True)
        for path in self.path.glob(f".*{TEMPORARY_MARK}*"):
            if path.is_file():
                path.unlink(missing_ok=True)

    def finished_model(self, images_seen: int) -> dict[str, float] | None:
        """The metrics of RUN/model where it is the model after this many images; None where that is still to write."""
        metrics = saved_metrics(self.model)
        if metrics is None or metrics.pop("images_seen") != images_seen:
            return None
        return metrics

    def prepare(self) -> None:
        """Create the folder and mend what a crash left; UserError where it cannot be written."""
        check_writable(self.path)
        self.recover()

    def begin(self, recipe_yaml: str) -> None:
        """`prepare`, and write the recipe and the environment of this start, which make the folder that of a run."""
        self.prepare()
        write_text(self.recipe, recipe_yaml)
        write_json(self.environment, environment())

    def settings(self) -> dict[str, Any]:
        """recipe.yaml as nested dicts, whatever version of the recipe it is; {} where there is none."""
        return load_config(_AnySettings, self.recipe).model_dump() if self.recipe.is_file() else {}

    def read_status(self) -> dict[str, Any]:
        """What status.json says; {} of an older run, or of one that never began."""
        try:
            status = json.loads(self.status.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return status if isinstance(status, dict) else {}

    def other_trainer(self) -> int | None:
        """The number of another process on this host that trains in this folder now; None where there is none."""
        status = self.read_status()
        process, is_here = status.get("process"), status.get("host") == socket.gethostname()
        if status.get("state") != "running" or not is_here or process in (None, os.getpid()):
            return None
        return process if is_alive(process, status.get("process_started", 0.0)) else None

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def drop_metrics_after(self, images_seen: int) -> None:
        """Forget lines of work that is about to be repeated, and what a crash left of the last line."""
        if self.metrics.exists():
            kept = [row for row in self.read_metrics() if row["images_seen"] <= images_seen]
            write_text(self.metrics, "".join(f"{json.dumps(row)}\n" for row in kept))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, without a last line that a crash cut off; [] where there is no such file."""
        rows: list[dict[str, Any]] = []
        if self.metrics.exists():
            for line in self.metrics.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue
                if isinstance(row, dict) and "images_seen" in row:
                    rows.append(row)
        return rows


def saved_metrics(folder: Path) -> dict[str, float] | None:
    """What metrics.json in a model folder says, images_seen among it; None where it is absent or not whole."""
    try:
        metrics = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return metrics if isinstance(metrics, dict) and "images_seen" in metrics else None


def is_alive(process: int, started: float) -> bool:
    """Whether the process of that number runs, and began then (seconds since the epoch)."""
    try:
        found = psutil.Process(process)
        # clocks are adjusted, and numbers are used again
        return found.status() != psutil.STATUS_ZOMBIE and abs(found.create_time() - started) < 2
    except psutil.Error:
        return False


def damage(folder: Path) -> str | None:
    """Why a checkpoint or a model folder cannot be whole; None where its JSON parses and no weight file is cut off."""
    for file in sorted([*folder.rglob("*.json"), *folder.rglob("*.safetensors")]):
        name = file.relative_to(folder)
        try:
            if file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif (size := file.stat().st_size) != (expected := _expected_bytes(file)):
                return f"{name} has {size:,} bytes instead of {expected:,}"
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            return f"{name} cannot be read ({one_line(error)})"
    return None


def _expected_bytes(file: Path) -> int:
    """By its header: 8 bytes of length (little-endian), that many bytes of JSON, then all tensors without a gap."""
    with open(file, "rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > file.stat().st_size:
            raise ValueError("its header is cut off")
        header = json.loads(opened.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return int(8 + length + max(ends, default=0))


def environment() -> dict[str, Any]:
    """Versions, commit and hardware, as JSON-ready values."""
    import torch

    packages = ("latentvae", "torch", "diffusers", "accelerate", "safetensors", "lpips", "pillow", "numpy")
    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed as a package"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _commit() -> str | None:
    """The commit of the clone this package runs from; None outside a clone."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    result = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.strip() or None
