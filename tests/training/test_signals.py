"""A stop signal ends a run between two steps and loses nothing."""

import signal
import subprocess
import sys
import time

import pytest

from latentvae.assembly import build
from latentvae.config import dump_yaml
from latentvae.training.run_dir import RunDirectory
from latentvae.training.signals import StopSignals
from tests.training.recipes import tiny_recipe
from tests.training.test_trainer import assert_bit_identical, tensors_below


def test_a_signal_is_kept_until_asked_for_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        assert signals.received is None
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_interrupt_is_immediate():
    with pytest.raises(KeyboardInterrupt), StopSignals():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
def test_sigterm_in_the_middle_then_resume_equals_an_undisturbed_run(photographs, tmp_path):
    settings = ["training.total_images=800", "training.mixed_precision=no", "training.keep_checkpoints=9"]
    run = tmp_path / "stopped"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_yaml(tiny_recipe(photographs, *settings)))
    command = [sys.executable, "-m", "latentvae", "train", "--recipe", str(recipe), "--out", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "--resume auto" in output
    (checkpoint,) = RunDirectory(run).all_checkpoints()
    assert 0 < int(checkpoint.name) < 800
    assert not (run / "model").exists()

    resumed = build(tiny_recipe(photographs, *settings), run, resume="auto", progress=False).train()
    straight = build(tiny_recipe(photographs, *settings), tmp_path / "straight", progress=False).train()
    assert_bit_identical(tensors_below(straight.checkpoint), tensors_below(resumed.checkpoint))
