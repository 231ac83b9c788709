"""What `latentvae info` says of runs and checkpoints, in every state that they can be in."""

import json
import os
import socket
import subprocess
import sys
from datetime import UTC, datetime

import psutil
import pytest

from latentvae.errors import UserError
from latentvae.info import describe_path
from latentvae.training.run_dir import RunDirectory

SETTINGS = {
    "model": {"preset": "f8c4", "start_from": None, "latent_channels": None},
    "data": {"source": "photos", "resolution": 256},
    "loss": {"kl_weight": 1e-6, "adversarial_weight": 0.5, "discriminator_start": 300, "adversarial_start": 400},
    "training": {
        "total_images": 1000,
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "learning_rate": 1e-4,
        "trainable": "all",
    },
    "validation": {"source": None, "fraction": 0.02},
}


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.begin(json.dumps(SETTINGS))
    run.append_metrics({"images_seen": 100, "reconstruction": 0.5, "kl": 2.0, "autoencoder_grad_norm": 1.0})
    run.append_metrics({"images_seen": 100, "validation_psnr": 21.0, "validation_lpips": 0.3})
    row = {"images_seen": 200, "reconstruction": 0.25, "kl": 2.0, "images_per_second": 10.0, "memory_bytes": 2**31}
    run.append_metrics(row)
    run.append_metrics({"images_seen": 200, "validation_psnr": 20.5, "validation_lpips": 0.35})
    return run


def status(run, state="running", reason=None, **changes):
    values = {
        "state": state,
        "reason": reason,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "process_started": psutil.Process().create_time(),
        "began": "2026-01-01T00:00:00+00:00",
        "written": datetime.now(UTC).isoformat(),
    }
    run.status.write_text(json.dumps(values | changes))


def checkpoint(run, images, **changes):
    folder = run.checkpoint(images)
    folder.mkdir(parents=True)
    state = {"images_seen": images, "seconds": 4000.0, "metrics": {"psnr": 20.5}, "recipe": SETTINGS}
    (folder / "state.json").write_text(json.dumps(state | changes))
    return folder


def test_a_run_is_explained_in_one_screen(run):
    checkpoint(run, 200)
    status(run)
    rows = describe_path(run.path)
    assert rows["what"].startswith("training run, running (process ")
    assert rows["trains"] == "a new f8c4: all of it"
    assert rows["data"] == "photos at 256 px; 0.02 of it held out for validation"
    assert rows["batch"] == "8 images, at most 4 in one forward; learning rate 0.0001"
    assert rows["progress"] == "200 of 1,000 images (20.0%), 1 min left, 10 images/s, 2.0 GiB of memory"
    status(run, expected_images=500)  # max_minutes will come first
    assert describe_path(run.path)["progress"].startswith("200 of 500 images (40.0%), 30 s left")
    assert rows["next"] == "discriminator trains from 300, adversarial term from 400"
    assert rows["terms"] == "reconstruction 0.25, kl 2"
    assert rows["last validation"] == "PSNR 20.50 dB, LPIPS 0.3500 (after 200 images)"
    assert rows["best validation"] == "PSNR 21.00 dB (after 100 images)"
    assert rows["checkpoints"].startswith("000000200 (") and "recipe.yaml (the whole recipe)" in rows["files"]
    assert "warning" not in rows and "continue with" not in rows
    assert len(rows) < 20 and not any("\n" in value for value in rows.values())


@pytest.mark.parametrize(
    "given, told",
    [
        ({"process_started": 0.0}, "killed: process"),  # the number belongs to another process by now
        ({"process": 2**22 + 1}, "killed: process"),
        ({"state": "ended", "reason": "SIGTERM"}, "stopped by SIGTERM"),
        ({"state": "ended", "reason": "ended"}, "stopped "),
        ({"state": "failed", "reason": "NonFiniteLoss: kl"}, "failed 0 s ago: NonFiniteLoss: kl"),
    ],
    ids=str,
)
def test_a_run_that_is_over_too_early_says_how_and_how_to_go_on(run, given, told):
    status(run, **given)
    rows = describe_path(run.path)
    assert rows["what"].startswith(f"training run, {told}")
    assert rows["continue with"] == f"latentvae train --recipe {run.recipe} --out {run.path} --resume auto"


def test_a_run_on_another_machine_is_believed_while_it_gives_signs(run):
    status(run, host="elsewhere")
    assert "running on elsewhere" in describe_path(run.path)["what"]
    assert "last sign" in describe_path(run.path)["what"]
    for path in (run.status, run.metrics):
        os.utime(path, (0, 0))
    assert "no sign of it for" in describe_path(run.path)["what"]


@pytest.mark.parametrize("reason, told", [("finished", "finished"), ("max_minutes", "finished: its max_minutes are")])
def test_a_finished_run_needs_nothing_more(run, reason, told):
    status(run, "ended", reason)
    rows = describe_path(run.path)
    assert rows["what"].startswith(f"training run, {told}") and "continue with" not in rows
    assert "left" not in rows["progress"] and "next" not in rows
    assert rows["progress"].startswith("200 images, 10 images/s")  # the total lies beyond its time


def test_a_folder_of_an_older_version_is_told_by_its_model(run):
    assert describe_path(run.path)["what"] == "training run, not finished"
    run.model.mkdir()
    (run.model / "config.json").write_text("{}")
    assert describe_path(run.path)["what"] == "training run, finished"


def test_the_best_model_and_standing_warnings_are_told(run):
    run.best.mkdir()
    (run.best / "config.json").write_text("{}")
    (run.best / "metrics.json").write_text('{"images_seen": 100, "psnr": 21.0, "lpips": 0.3}')
    for images in (210, 220, 230):
        run.append_metrics({"images_seen": images, "reconstruction": 0.2, "kl": 0.0})
    rows = describe_path(run.path)
    assert rows["best validation"] == "PSNR 21.00 dB, LPIPS 0.3000 (after 100 images)"
    assert rows["best"].endswith("after 100 images)")
    assert rows["warning"].startswith("no information in the latents")
    assert describe_path(run.best)["measured"] == "PSNR 21.00 dB, LPIPS 0.3000 (after 100 images)"


def test_what_is_fine_tuned_is_told(run):
    changed = SETTINGS | {
        "model": {"preset": "f8c4", "start_from": "some/vae"},
        "training": SETTINGS["training"] | {"trainable": "decoder"},
        "data": {"source": None, "sources": [{"source": "a"}, {"source": "b"}], "resolution": 64},
        "validation": {"source": "held_out"},
    }
    run.recipe.write_text(json.dumps(changed))
    rows = describe_path(run.path)
    assert rows["trains"] == "from some/vae: the decoder alone"
    assert rows["data"] == "a, b at 64 px; validation on held_out"
    changed["training"] = SETTINGS["training"] | {"trainable": ["decoder.*"], "lora": None}
    changed["model"] = {"preset": "f8c4", "latent_channels": 8}
    run.recipe.write_text(json.dumps(changed))
    assert describe_path(run.path)["trains"] == (
        "a new f8c4 with its own latent_channels: parameters that match decoder.*"
    )


def test_what_a_fine_tune_measures_and_leaves_behind_is_told(run):
    changed = SETTINGS | {"training": SETTINGS["training"] | {"micro_batch_size": "auto"}}
    run.recipe.write_text(json.dumps(changed))
    run.drift.write_text("{}")
    run.append_metrics({"images_seen": 300, "validation_psnr": 20.0, "validation_equivariance_error": 0.125})
    rows = describe_path(run.path)
    assert rows["batch"] == "8 images, as many in one forward as fit; learning rate 0.0001"
    assert rows["last validation"] == "PSNR 20.00 dB, equivariance error 0.1250 (after 300 images)"
    assert "drift.json (how far fine-tuning moved the latents)" in rows["files"]


def test_a_checkpoint_is_explained(run):
    folder = checkpoint(run, 200)
    rows = describe_path(folder)
    assert rows["what"] == "training checkpoint, whole"
    assert rows["images seen"] == "200 of 1,000 images (20.0%)"
    assert rows["trained for"] == "1 h 07 min" and rows["validation"] == "PSNR 20.50 dB"
    assert rows["continue with"].endswith("--resume auto")
    (folder / "x.safetensors").write_bytes(b"cut")
    assert "damaged: x.safetensors" in describe_path(folder)["what"]
    assert "damaged" in describe_path(run.path)["checkpoints"]
    (folder / "state.json").write_text("[]")
    with pytest.raises(UserError, match="JSON object"):
        describe_path(folder)


def test_no_torch_is_needed(run):
    checkpoint(run, 200)
    code = "import sys; from latentvae.info import describe_path; "
    code += (
        "[describe_path(path) for path in sys.argv[1:]]; print(*{'torch', 'matplotlib', 'numpy'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(run.path), str(run.checkpoint(200))]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_a_checkpoint_may_lie_anywhere(run, monkeypatch):
    """Even at the root of a file system, as a volume that is mounted there."""
    folder = checkpoint(run, 200)
    monkeypatch.setattr(type(folder), "resolve", lambda self: type(self)(self.anchor) / self.name)
    assert "continue with" not in describe_path(folder)
