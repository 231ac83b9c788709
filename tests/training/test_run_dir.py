"""Which checkpoints a run folder holds, and what of them counts as whole."""

import json

import pytest

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
