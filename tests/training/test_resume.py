"""Stopped anywhere and resumed, on the same number of processes or another, a run ends with the same weights."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from latentvae.training.run_dir import RunDirectory
from tests.training.process_runs import (
    GLOBAL_BATCH,
    WHOLE_STEP,
    assert_bit_identical,
    end_family,
    largest_difference,
    newest,
    recipe_file,
    run,
    start,
    tensors_below,
    trained,
    trained_until,
    weights_of,
)

pytestmark = [pytest.mark.multiprocess, pytest.mark.skipif(os.name == "nt", reason="no SIGTERM to be caught")]
# Of the tiny recipe: 4 images a step, the discriminator starts at 8 images, its term at 16, the end is at 32.
# A stop leaves out the validation that is due in its step, which RUN/best would show: none is due here.
STOPS = (8, 16, 24)  # on both boundaries and in the GAN phase
AUGMENTED = ("data.num_workers=2", "training.save_every_images=20", "training.keep_checkpoints=9")


def stopped_at(stops, count, source, out, settings, *, rank):
    for images in stops:
        start(out.with_suffix(".said"), count, trained_until, source, out, settings, rank, images).require_success()
        assert newest(out).name == f"{images:09d}"


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("processes", [1, 2])
def test_stopped_on_every_boundary_a_run_is_bit_identical(photographs, tmp_path, processes, precision):
    """SIGTERM to the last process alone, worker processes on; the accumulation is of two forwards for one process."""
    settings = (*AUGMENTED, f"training.mixed_precision={precision}")
    straight = run(processes, photographs, tmp_path / "straight", *settings)
    stopped = tmp_path / "stopped"
    stopped_at(STOPS, processes, photographs, stopped, settings, rank=processes - 1)
    run(processes, photographs, stopped, *settings, resume="auto")
    for rank in range(processes):
        assert_bit_identical(weights_of(straight, rank), weights_of(stopped, rank))
    assert_bit_identical(tensors_below(newest(straight)), tensors_below(newest(stopped)))
    assert_bit_identical(tensors_below(straight / "model"), tensors_below(stopped / "model"))
    for file in ("model/config.json", "model/metrics.json"):
        assert (straight / file).read_text() == (stopped / file).read_text()
    states = [json.loads((newest(out) / "state.json").read_text()) for out in (straight, stopped)]
    for name in states[0].keys() - {"seconds", "recipe"}:
        assert states[0][name] == states[1][name], name


def test_one_then_three_then_two_processes(photographs, tmp_path):
    """The same images, noise and augmentation: in float64 the same weights."""
    one = run(1, photographs, tmp_path / "one", *WHOLE_STEP)
    moved = tmp_path / "moved"
    for processes, images in ((1, 2 * GLOBAL_BATCH), (3, 4 * GLOBAL_BATCH)):
        stopped_at((images,), processes, photographs, moved, WHOLE_STEP, rank=0)
    run(2, photographs, moved, *WHOLE_STEP, resume="auto")
    assert largest_difference(tensors_below(newest(one)), tensors_below(newest(moved))) < 1e-9


def sees_less(source, out, settings):
    """Resume where the second process does not see the newest checkpoint yet, as on a shared file system."""
    find = RunDirectory.find_checkpoint

    def found(self, resume):
        return self.all_checkpoints()[0] if os.environ["RANK"] == "1" else find(self, resume)

    RunDirectory.find_checkpoint = found
    trained(source, out, settings, "auto")


def test_all_processes_continue_from_what_the_first_one_found(photographs, tmp_path):
    settings = (*WHOLE_STEP, f"training.save_every_images={GLOBAL_BATCH}", "training.keep_checkpoints=9")
    straight, stopped = run(2, photographs, tmp_path / "straight", *settings), tmp_path / "stopped"
    stopped_at((3 * GLOBAL_BATCH,), 2, photographs, stopped, settings, rank=0)
    start(tmp_path / "said", 2, sees_less, photographs, stopped, settings).require_success()
    assert_bit_identical(weights_of(straight, 0), weights_of(stopped, 0))
    assert_bit_identical(weights_of(straight, 1), weights_of(stopped, 1))


def command(recipe, out, processes):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    options = ["--recipe", str(recipe), "--out", str(out), "--resume", "auto"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "latentvae", "train", *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_sigterm_to_one_of_two_processes_stops_both_and_resume_continues(photographs, tmp_path):
    """Under torchrun, which sees two processes that end well."""
    import psutil

    settings = (*WHOLE_STEP, "training.log_every_images=12", "data.num_workers=1")
    long = (*settings, f"training.total_images={10_000 * GLOBAL_BATCH}")
    out, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    launch = command(recipe_file(tmp_path / "long.yaml", photographs, *long), out, 2)
    try:
        deadline = time.monotonic() + 200
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
            assert launch.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        trainers = [child for child in psutil.Process(launch.pid).children() if "latentvae" in child.cmdline()]
        (second,) = [child for child in trainers if child.environ()["RANK"] == "1"]
        os.kill(second.pid, signal.SIGTERM)
        said = launch.communicate(timeout=120)[0]
    finally:
        end_family(launch.pid)
    assert launch.returncode == 0, said
    assert "continue with: latentvae train" in said and len(trainers) == 2
    images = int(newest(out).name)
    steps = images // GLOBAL_BATCH
    assert images % GLOBAL_BATCH == 0 and steps >= 2
    longer = (*settings, f"training.total_images={images + GLOBAL_BATCH}")
    going_on = command(recipe_file(tmp_path / "rest.yaml", photographs, *longer), out, 2)
    said = going_on.communicate(timeout=200)[0]
    assert going_on.returncode == 0 and f"finished after {images + GLOBAL_BATCH} images" in said, said
    one = run(1, photographs, tmp_path / "one", *longer)
    # AdamW spreads rounding a little further with each of these unforeseeably many steps.
    assert largest_difference(tensors_below(newest(one)), tensors_below(newest(out))) < 1e-9 * max(1, steps / 5)
