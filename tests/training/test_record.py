"""What a run writes down: means over steps and processes, one readable line, warnings, status, pictures."""

import json
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from latentvae.training.record import RunRecord
from latentvae.training.run_dir import RunDirectory
from latentvae.training.validation import LatentStatistics, ValidationResult

SETTINGS = {
    "model": {"preset": "f8c4"},
    "loss": {"kl_weight": 1e-6, "adversarial_weight": 0.0, "adaptive_max": 0.05},
    "training": {"total_images": 1000, "max_grad_norm": 1.0},
}


class Tracker:
    name = "tensorboard"

    def __init__(self):
        self.images = {}

    def log_images(self, values, step, **layout):
        self.images |= {name: (step, value.shape, layout) for name, value in values.items()}


def accelerator(gather=lambda table: table, trackers=()):
    """One process, or what `gather` makes of its table."""
    logged = []
    return SimpleNamespace(
        is_main_process=True,
        num_processes=1,
        device=torch.device("cpu"),
        log_with=[],
        trackers=list(trackers),
        gather=gather,
        logged=logged,
        log=lambda values, step: logged.append((step, values)),
    )


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.begin(json.dumps(SETTINGS))
    return run


def terms(**values):
    return {name: torch.tensor(value) for name, value in values.items()}


def validation(psnr, active=4):
    latents = LatentStatistics(0.1, 2.0, (0.1, 0.1, 0.1, 0.1), (2.0, 2.0, 2.0, 2.0), active)
    picture = np.zeros((8, 8, 3), dtype=np.uint8)
    return ValidationResult({"psnr": psnr, "active_channels": active}, 5, latents, [], picture)


def test_means_are_over_the_steps_that_have_the_figure(run):
    fake = accelerator()
    with RunRecord(run, fake, SETTINGS) as record:
        record.add(terms(reconstruction=1.0, kl=2.0))
        record.add(terms(reconstruction=3.0, kl=2.0, adversarial=5.0))
        figures = record.log_terms(100, {"images_per_second": 7.0})
        assert figures == {"reconstruction": 2.0, "kl": 2.0, "adversarial": 5.0, "images_per_second": 7.0} | {
            "memory_bytes": figures["memory_bytes"]
        }
        assert figures["memory_bytes"] > 1e6
        record.add(terms(reconstruction=9.0))
        assert record.log_terms(200)["reconstruction"] == 9.0  # the first interval is forgotten
    first, second = run.read_metrics()
    assert first == {"images_seen": 100} | figures and "adversarial" not in second
    assert fake.logged[0][1]["train/adversarial"] == 5.0


def test_means_are_over_all_processes_and_memory_is_that_of_the_largest(run):
    def two_processes(table):
        other = table.clone()
        other[:, 0, 0] += 4.0  # the sum of reconstruction over two steps
        other[:, -1, 0] *= 3
        return torch.cat([table, other])

    record = RunRecord(run, accelerator(two_processes), SETTINGS)
    record.add(terms(reconstruction=1.0))
    record.add(terms(reconstruction=2.0))
    alone = RunRecord(run, accelerator(), SETTINGS).log_terms(0)["memory_bytes"]
    figures = record.log_terms(100)
    assert figures["reconstruction"] == (1 + 2 + 1 + 2 + 4) / 4
    assert figures["memory_bytes"] > 2 * alone


def test_what_is_not_finite_is_left_out(run):
    record = RunRecord(run, accelerator(), SETTINGS)
    record.add(terms(reconstruction=1.0, autoencoder_grad_norm=float("inf"), other=float("nan")))
    record.add(terms(reconstruction=1.0, autoencoder_grad_norm=2.0, other=float("inf")))
    figures = record.log_terms(100)
    assert figures["autoencoder_grad_norm"] == 2.0 and "other" not in figures
    json.loads(run.metrics.read_text(), parse_constant=lambda name: pytest.fail(name))


def test_a_plain_line_says_how_far_how_fast_and_how_long(run, caplog):
    record = RunRecord(run, accelerator(), SETTINGS)
    with caplog.at_level(logging.INFO, "latentvae"):
        record.add(terms(reconstruction=0.123456, autoencoder_grad_norm=3.0))
        record.log_terms(250, {"images_per_second": 0.5})
        record.add(terms(reconstruction=0.1))
        record.log_terms(500, {"images_per_second": 0.0}, total_images=600)
    first, second = caplog.messages
    assert first.startswith("250 of 1,000 images (25.0%), 25 min left, 0.5 images/s, ")
    assert first.endswith("iB: reconstruction 0.1235")
    assert second.startswith("500 of 600 images (83.3%), ") and "left" not in second and "images/s" not in second


def test_a_warning_reaches_the_log_and_is_not_repeated_after_a_resume(run, caplog):
    with RunRecord(run, accelerator(), SETTINGS) as record:
        for images in (100, 200, 300, 400):
            record.add(terms(reconstruction=1.0, kl=0.0))
            record.log_terms(images)
    assert run.log.read_text().count("no information in the latents") == 1
    with RunRecord(run, accelerator(), SETTINGS, images_seen=400) as record:
        for images in (500, 600, 700, 800):
            record.add(terms(reconstruction=1.0, kl=0.0))
            record.log_terms(images)
    assert run.log.read_text().count("no information in the latents") == 1
    assert [row["images_seen"] for row in run.read_metrics() if row.get("event") == "resumed"] == [400]


def test_status_tells_that_it_runs_and_how_it_ended(run):
    def status():
        return json.loads(run.status.read_text())

    with RunRecord(run, accelerator(), SETTINGS) as record:
        assert (status()["state"], status()["process"]) == ("running", os.getpid())
        record.add(terms(reconstruction=1.0))
        record.log_terms(200, total_images=600)
        record.end(300, "SIGTERM")
    assert status()["expected_images"] == 600
    assert (status()["state"], status()["reason"], status()["images_seen"]) == ("ended", "SIGTERM", 300)
    with pytest.raises(ValueError), RunRecord(run, accelerator(), SETTINGS):
        raise ValueError("two\nlines")
    assert (status()["state"], status()["reason"]) == ("failed", "ValueError: two lines")
    assert "ValueError: two" in run.log.read_text()


def test_a_validation_leaves_figures_a_picture_and_the_end_the_curves(run):
    tracker = Tracker()
    with RunRecord(run, accelerator(trackers=[tracker]), SETTINGS) as record:
        record.log_validation(100, validation(20.0))
        assert not run.curves.exists()
    (row,) = run.read_metrics()
    assert (row["validation_psnr"], row["validation_active_channels"], row["validation_latent_channels"]) == (20, 4, 4)
    assert row["validation_channel_std"] == [2.0] * 4
    assert Image.open(run.samples / "000000100.png").size == (8, 8)
    assert Image.open(run.curves).width > 500
    assert tracker.images["curves"][0] == 100 and tracker.images["curves"][1][-1] == 3
    assert tracker.images["validation/reconstructions"][1] == (1, 8, 8, 3)


def test_a_picture_that_fails_does_not_end_the_run(run, monkeypatch):
    def broken(run):
        raise RuntimeError("no font")

    monkeypatch.setattr("latentvae.training.curves.draw_run", broken)
    with RunRecord(run, accelerator(), SETTINGS) as record:
        record.log_validation(100, validation(20.0))
    assert "could not be drawn: RuntimeError: no font" in run.log.read_text()
    assert json.loads(run.status.read_text())["state"] == "ended"


SCRIPT = """
import sys
import torch
from accelerate import Accelerator, PartialState
PartialState(cpu=True)
from latentvae.training.record import RunRecord
from latentvae.training.run_dir import RunDirectory
accelerator = Accelerator()
assert accelerator.num_processes == 2
settings = {"training": {"total_images": 100}}
with RunRecord(RunDirectory(sys.argv[1]), accelerator, settings) as record:
    for step in range(3):
        record.add({"reconstruction": torch.tensor(step + 10.0 * accelerator.process_index)})
    print(record.log_terms(10)["reconstruction"])
"""


@pytest.mark.multiprocess
def test_two_real_processes_log_the_mean_of_both(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    (tmp_path / "run").mkdir()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*launcher, str(script), str(tmp_path / "run")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["6.0", "6.0"]
    (row,) = RunDirectory(tmp_path / "run").read_metrics()
    assert row["reconstruction"] == 6.0
