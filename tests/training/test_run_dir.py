"""Which checkpoints a run folder holds, and what of them counts as whole."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from latentvae.errors import UserError
from latentvae.training.run_dir import STATE_FILE, RunDirectory


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    for images in (400, 1200, 800):
        folder = run.checkpoint(images)
        folder.mkdir(parents=True)
        (folder / STATE_FILE).write_text("{}")
    return run


def test_the_newest_whole_checkpoint_is_found(run):
    (run.checkpoint(5000)).mkdir()  # no state file: an interrupted copy
    (run.checkpoints / ".000001600.tmp-1-ab").mkdir()
    assert run.find_checkpoint("auto") == run.checkpoint(1200)
    assert [int(path.name) for path in run.all_checkpoints()] == [400, 800, 1200]


def test_prune_keeps_the_newest_and_clears_leftovers(run):
    (run.checkpoints / ".000001600.tmp-1-ab").mkdir()
    run.prune(2)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["000000800", "000001200"]


def test_resume_rules(run, tmp_path):
    assert RunDirectory(tmp_path / "new").find_checkpoint("auto") is None
    assert RunDirectory(tmp_path / "new").find_checkpoint(None) is None
    assert run.find_checkpoint(run.checkpoint(1200)) == run.checkpoint(1200)
    assert RunDirectory(tmp_path / "new").find_checkpoint(run.checkpoint(400)) == run.checkpoint(400)
    with pytest.raises(UserError, match=r"000001200, which does not follow from .*000000400"):  # it would be pruned
        run.find_checkpoint(run.checkpoint(400))
    with pytest.raises(UserError, match="--resume auto"):
        run.find_checkpoint(None)
    with pytest.raises(UserError, match="not a checkpoint"):
        run.find_checkpoint(tmp_path / "nowhere")


def test_a_damaged_newest_checkpoint_is_named_and_no_older_one_is_taken_unasked(run):
    newest = run.checkpoint(1200)
    save_file({"a": torch.zeros(5)}, newest / "a.safetensors")
    assert run.find_checkpoint("auto") == newest
    whole = (newest / "a.safetensors").read_bytes()
    for broken, why in ((whole[:-1], "bytes instead of"), (whole[:20], "cannot be read"), (b"", "cannot be read")):
        (newest / "a.safetensors").write_bytes(broken)
        with pytest.raises(UserError, match=rf"000001200 is damaged: a.safetensors .*{why}.*continue from 000000800"):
            run.find_checkpoint("auto")
    (newest / "a.safetensors").unlink()
    (newest / STATE_FILE).write_text('{"images_seen": 12')
    with pytest.raises(UserError, match=r"damaged: state.json cannot be read"):
        run.find_checkpoint("auto")
    shutil.rmtree(newest)
    assert run.find_checkpoint("auto") == run.checkpoint(800)


def test_the_model_of_a_finished_run_is_known_by_its_images(run):
    assert run.finished_model(1200) is None
    run.model.mkdir()
    assert run.finished_model(1200) is None
    (run.model / "metrics.json").write_text('{"images_seen": 1200, "psnr": 20.5}')
    assert run.finished_model(1200) == {"psnr": 20.5}
    assert run.finished_model(2400) is None


def test_settings_are_read_without_torch(run):
    assert run.settings() == {}
    run.begin("loss:\n  kl_weight: 1e-6\nunheard_of: {a: [1, 2]}\n")
    assert run.settings() == {"loss": {"kl_weight": 1e-6}, "unheard_of": {"a": [1, 2]}}
    code = f"import sys; import latentvae.training.run_dir as r; r.RunDirectory({str(run.path)!r}).settings(); "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_begin_writes_recipe_and_environment_and_refuses_a_folder_it_cannot_write(run, tmp_path):
    run.begin("model: {}\n")
    assert run.recipe.read_text() == "model: {}\n"
    assert json.loads(run.environment.read_text())["packages"]["torch"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        RunDirectory(tmp_path / "file" / "run").begin("")


def test_metrics_of_repeated_work_are_forgotten(run):
    for images in (100, 200, 300):
        run.append_metrics({"images_seen": images, "loss": 1.0})
    with open(run.metrics, "a", encoding="utf-8") as file:
        file.write('{"images_seen": 150, "lo')  # where a crash cut the line off
    run.drop_metrics_after(200)
    assert [json.loads(line)["images_seen"] for line in run.metrics.read_text().splitlines()] == [100, 200]
