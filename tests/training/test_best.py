"""RUN/best is the model of the best validation, through resumes and crashes."""

import json

import diffusers
import pytest
import torch

from latentvae.errors import UserError
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.training.best import BestModel
from latentvae.training.run_dir import RunDirectory


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, mid_block_add_attention=False)


def test_more_psnr_and_less_lpips_are_better(run):
    for metric, values, better in (("psnr", (20.0, 21.0, 20.5), (1, 1, 0)), ("lpips", (0.5, 0.4, 0.45), (1, 1, 0))):
        best = BestModel(run, metric)
        for value, expected in zip(values, better, strict=True):
            assert best.is_better({metric: value}) == bool(expected)
            if expected:
                best.note(100, {metric: value})
        assert not best.is_better({metric: best.value}) and not best.is_better({metric: float("nan")})
    assert not BestModel(run, "psnr").is_better({"psnr": float("nan")})
    assert not BestModel(run, "none").is_better({"psnr": 20.0})


def test_lpips_is_refused_where_it_is_not_measured(run):
    with pytest.raises(UserError, match=r"training.best_metric is lpips.*psnr or none"):
        BestModel(run, "lpips", has_lpips=False)
    BestModel(run, "psnr", has_lpips=False)


def test_the_saved_model_is_a_diffusers_folder_with_its_figures(run, vae):
    best = BestModel(run, "psnr")
    best.save(vae, 100, {"psnr": 20.0})
    with torch.no_grad():
        vae.decoder.conv_out.bias.add_(1.0)
    best.save(vae, 200, {"psnr": 21.0, "lpips": 0.3})
    loaded = diffusers.AutoencoderKL.from_pretrained(run.best)
    assert torch.equal(loaded.decoder.conv_out.bias, vae.decoder.conv_out.bias)
    assert json.loads((run.best / "metrics.json").read_text()) == {"images_seen": 200, "psnr": 21.0, "lpips": 0.3}
    assert [path.name for path in run.path.iterdir()] == ["best"]


def test_a_resumed_run_knows_what_was_best_when_its_checkpoint_was_made(run, vae):
    best = BestModel(run, "psnr")
    best.save(vae, 100, {"psnr": 20.0, "lpips": 0.5})
    state = json.loads(json.dumps(best.state()))
    best.save(vae, 200, {"psnr": 22.0, "lpips": 0.3})  # after the checkpoint: this work will be repeated
    resumed = BestModel(run, "psnr", state)
    assert (resumed.value, resumed.images_seen) == (20.0, 100)
    assert resumed.is_better({"psnr": 22.0}) and not resumed.is_better({"psnr": 19.0})
    assert BestModel(run, "psnr").value == 22.0  # a checkpoint that does not say: the folder does
    assert BestModel(run, "lpips", state).value is None  # another metric begins anew
    assert BestModel(RunDirectory(run.path / "elsewhere"), "psnr", state).value is None  # nothing lies there yet


@pytest.mark.parametrize("name", ["best", "model"])
def test_a_crash_between_the_two_renames_is_mended(run, vae, name):
    place = getattr(run, name)
    best = BestModel(run, "psnr")
    best.save(vae, 100, {"psnr": 20.0})
    run.best.rename(run.path / f".{name}.tmp-1-old")
    best.save(vae, 200, {"psnr": 21.0})
    run.best.rename(run.path / f".{name}.tmp-1-new")
    best.save(vae, 300, {"psnr": 22.0})
    cut = run.path / f".{name}.tmp-1-cut"
    run.best.rename(cut)
    weights = cut / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])  # a process that was killed while it wrote
    run.recover()
    assert json.loads((place / "metrics.json").read_text())["images_seen"] == 200
    assert [path.name for path in run.path.iterdir()] == [name]


def test_leftovers_beside_a_whole_model_are_cleared(run, vae):
    best = BestModel(run, "psnr")
    best.save(vae, 200, {"psnr": 20.0})
    run.best.rename(run.path / ".best.tmp-1-old")
    best.save(vae, 100, {"psnr": 20.0})
    run.begin("{}\n")
    assert json.loads((run.best / "metrics.json").read_text())["images_seen"] == 100
    assert not list(run.path.glob(".best*"))
