"""What is said of a run before it starts: what it would refuse, and what it would take."""

import re

import pytest
import torch

from latentvae import cli
from latentvae.assembly import build
from latentvae.checkpoint import save_model
from latentvae.dry_run import describe
from latentvae.errors import UserError
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.recipe import Recipe, load_recipe
from tests.training.recipes import tiny_recipe, tiny_settings

SETTINGS = (
    "data.resolution=32",
    "data.num_workers=0",
    "loss.perceptual=none",
    "training.total_images=4",
    "training.global_batch_size=4",
    "training.trackers=[]",
    "validation.fraction=0.25",
)


def fine_tune(photographs, tmp_path, *settings) -> Recipe:
    torch.manual_seed(0)
    start = save_model(AutoencoderKL.from_preset("f8c4-tiny"), tmp_path / "start", overwrite=True)
    return load_recipe(None, [*SETTINGS, f"data.source={photographs}", f"model.start_from={start}", *settings])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["training.trainable=['nothing.*']"], "training.trainable has 'nothing.*'"),
        (["training.lora.targets=['nothing.*']"], "training.lora.targets has 'nothing.*'"),
        (["training.posterior_sigma=1e9"], "training.posterior_sigma is 1e+09"),
        (["training.posterior_sigma=0.5", "training.trainable=decoder"], "training.trainable=decoder freezes"),
        (["training.posterior_sigma=0.5", "training.lora.rank=4"], "training.lora would move the sigma"),
        (["loss.autoencoder_start=2"], "there is no discriminator to train before it"),
        (["training.trainable=['encoder.*']", "training.decoder_only_start=2"], "decoder_only_start freezes the encod"),
    ],
)
def test_what_a_run_would_refuse_is_refused(photographs, tmp_path, settings, told):
    recipe = fine_tune(photographs, tmp_path, *settings)
    with pytest.raises(UserError, match=re.escape(told)):
        describe(recipe)


@pytest.mark.parametrize(
    "trains",
    [
        "training.trainable=all",
        "training.trainable=decoder",
        "training.trainable=['encoder.*']",
        "training.lora.rank=8",
    ],
)
def test_the_size_of_a_checkpoint_is_that_of_what_trains(photographs, tmp_path, trains):
    if "lora" in trains:
        pytest.importorskip("peft")
    recipe = fine_tune(photographs, tmp_path, trains)
    (said,) = re.findall(r"^disk +(\d+) MiB a checkpoint", describe(recipe), re.MULTILINE)
    checkpoint = build(recipe, tmp_path / "run", progress=False).train().checkpoint
    written = sum(file.stat().st_size for file in checkpoint.rglob("*.safetensors")) / 2**20
    assert written > 5 and abs(int(said) - written) < 1


def test_the_command_tells_the_phases_that_a_longer_run_keeps(photographs, tmp_path, caplog):
    open_starts = ("loss.discriminator_start=null", "loss.adversarial_start=null")
    short = tiny_recipe(photographs, *open_starts, "training.total_images=16")
    build(short, tmp_path / "run", progress=False).train()
    (tmp_path / "recipe.yaml").write_text("{}\n")
    command = ["train", "--recipe", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run"), "--resume", "auto"]
    for setting in tiny_settings(photographs, *open_starts):
        command += ["--set", setting]
    with caplog.at_level("INFO", "latentvae"), pytest.raises(SystemExit, match="0"):
        cli.main(command)
    assert "adversarial trained from image 6, felt by the decoder from 8" in caplog.text
