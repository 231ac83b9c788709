"""The folder of a run: what lies where, and how a run is found again.

RUN/recipe.yaml                 the fully resolved recipe
RUN/environment.json            versions, commit, hardware
RUN/log.txt                     what the run said
RUN/metrics.jsonl               one JSON object per logged step or validation
RUN/unreadable.csv              files that could not be used, and why
RUN/samples/<images_seen>.png   originals above reconstructions
RUN/tensorboard/                and what other trackers write
RUN/checkpoints/<images_seen>/  everything that resume needs (see checkpoints.py)
RUN/model/                      the finished model, a diffusers folder (the EMA where it is on)
"""

import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from latentvae.errors import UserError
from latentvae.files import TEMPORARY_MARK, check_writable, write_json, write_text

STATE_FILE = "state.json"  # written last in a checkpoint folder, which is itself renamed into place when whole


class RunDirectory:
    """Paths and small files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.environment = self.path / "environment.json"
        self.log = self.path / "log.txt"
        self.metrics = self.path / "metrics.jsonl"
        self.unreadable = self.path / "unreadable.csv"
        self.samples = self.path / "samples"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"

    def find_checkpoint(self, resume: str | Path | None) -> Path | None:
        """The checkpoint to continue from.

        Args:
            resume: None starts a new run, "auto" takes the newest checkpoint of this folder (None where there is none
                yet: a job that is started again and again begins with no checkpoint), a path takes that one.

        Raises:
            UserError: a new run in a folder that holds one, a path that is not a checkpoint, or a path while this
                folder has newer ones: they would pass for what follows it.
        """
        if resume is None:
            if self.recipe.exists() or self.all_checkpoints():
                raise UserError(f"{self.path} holds a run already: pass --resume auto to continue it, or another --out")
            return None
        if str(resume) == "auto":
            found = self.all_checkpoints()
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

    def begin(self, recipe_yaml: str) -> None:
        """Create the folder and write the recipe and the environment of this start.

        Raises:
            UserError: the folder cannot be written.
        """
        check_writable(self.path)
        write_text(self.recipe, recipe_yaml)
        write_json(self.environment, environment())

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
                    rows.append(json.loads(line))
                except json.JSONDecodeError:
                    continue
        return rows


def environment() -> dict[str, Any]:
    """Versions, commit and hardware, as JSON-ready values."""
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
