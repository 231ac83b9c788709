"""The SLURM script runs as it stands: two tasks of an array at once make one store."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from latentvae.checkpoint import save_model
from latentvae.latents.encoding.encode import encode_dataset
from latentvae.latents.operating.verify import verify_store
from tests.latents.stores import contents, rows_of, tiny_vae, write_pictures

SCRIPT = Path(__file__).parents[2] / "train" / "slurm" / "encode_array.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def task(number, *arguments):
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "SLURM_ARRAY_JOB_ID": "100",
        "SLURM_ARRAY_TASK_ID": str(number),
        "SLURM_CPUS_PER_TASK": "1",
        "WORLD_SIZE": "2",  # of the launcher that the job was submitted from
        "RANK": "1",
    }
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_without_arguments_it_says_how_it_is_used():
    said, error = (process := task(0)).communicate(timeout=60)
    assert process.returncode == 2 and said == "" and error.startswith("usage: sbatch train/slurm/encode_array.sh")


def test_what_slurm_reads_stands_before_the_first_command():
    """sbatch ignores what comes later."""
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH ")]
    assert lines[0] == "#!/bin/bash" and len(options) >= 5 and max(options) < first_command
    assert os.access(SCRIPT, os.X_OK)


@pytest.mark.multiprocess
def test_two_tasks_at_once_make_one_store(tmp_path):
    write_pictures(tmp_path / "pictures", 60)
    vae = tiny_vae()
    save_model(vae, tmp_path / "model")
    options = {"resolution": 32, "unit_images": 3, "batch_size": 2}
    encode_dataset(
        tmp_path / "pictures", str(tmp_path / "model"), tmp_path / "alone", num_workers=0, progress=False, **options
    )
    arguments = [tmp_path / "pictures", "--vae", tmp_path / "model", "--out", tmp_path / "store"]
    for name, value in options.items():
        arguments += [f"--{name.replace('_', '-')}", value]
    tasks = [task(number, *arguments) for number in range(2)]
    for number, process in enumerate(tasks):
        said, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        assert said.startswith(f"task {number} of job 100 on ") and "60 of 60 images encoded" in said
    assert contents(tmp_path / "store") == contents(tmp_path / "alone")
    assert len(rows_of(tmp_path / "store")) == 60 and verify_store(tmp_path / "store").is_whole
