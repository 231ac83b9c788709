"""A run that is continued with another recipe, and one that goes back to a checkpoint of another phase."""

import pytest
import torch
from safetensors.torch import load_file

from latentvae import cli
from latentvae.assembly import build
from latentvae.checkpoint import save_model
from latentvae.errors import UserError
from latentvae.losses.objective import Objective
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.recipe import load_recipe
from tests.training.recipes import tiny_recipe, tiny_settings
from tests.training.test_trainer import assert_bit_identical
from tests.training.updaters import tiny_autoencoder

HALF = "training.total_images=16"


def test_a_refused_recipe_leaves_that_of_the_run(photographs, tmp_path):
    run = tmp_path / "run"
    build(tiny_recipe(photographs, HALF), run, progress=False).train()
    before = (run / "recipe.yaml").read_bytes()
    with pytest.raises(UserError, match="another model"):
        build(tiny_recipe(photographs, "model.block_out_channels=[8,32]"), run, resume="auto", progress=False)
    with pytest.raises(UserError, match="this recipe trains"):
        build(tiny_recipe(photographs, "loss.adversarial_weight=0"), run, resume="auto", progress=False)
    assert (run / "recipe.yaml").read_bytes() == before


def test_a_new_run_that_is_refused_does_not_take_the_folder(photographs, tmp_path):
    """The next try, with the mistake mended, needs no --resume."""
    wrong = tiny_recipe(photographs, "loss.discriminator_start=0", "training.posterior_sigma=1e9")
    with pytest.raises(UserError, match="posterior_sigma"):
        build(wrong, tmp_path / "run", progress=False)
    assert build(tiny_recipe(photographs), tmp_path / "run", progress=False).train().reason == "finished"


def test_auto_replaces_a_number_that_was_given_before(photographs, tmp_path, monkeypatch):
    """As after running out of memory with it."""
    build(tiny_recipe(photographs, HALF, "training.micro_batch_size=4"), tmp_path / "run", progress=False).train()
    monkeypatch.setattr("latentvae.training.update.Updater.largest_micro_batch", lambda *_: 1)
    recipe = tiny_recipe(photographs, "training.micro_batch_size=auto")
    trainer = build(recipe, tmp_path / "run", resume="auto", progress=False)
    assert trainer.micro_batch["size"] == 1 and trainer.accelerator.gradient_accumulation_steps == 4


def test_a_sigma_is_not_changed_within_a_run(photographs, tmp_path):
    """It lies in weights: those of the checkpoint would replace it, and then stay as they are."""
    build(tiny_recipe(photographs, HALF), tmp_path / "run", progress=False).train()
    with pytest.raises(UserError, match=r"another model: training\.posterior_sigma: None -> 0\.5"):
        build(tiny_recipe(photographs, "training.posterior_sigma=0.5"), tmp_path / "run", resume="auto", progress=False)


def test_a_starting_model_may_move_but_not_be_another(photographs, tmp_path):
    plain = [setting for setting in tiny_settings(photographs, HALF) if not setting.startswith("model.")]
    torch.manual_seed(0)
    first, other = (save_model(tiny_autoencoder(), tmp_path / "first"), tmp_path / "other")
    save_model(AutoencoderKL.from_preset("f8c4-tiny"), other)
    run = tmp_path / "run"
    build(load_recipe(None, [*plain, f"model.start_from={first}"]), run, progress=False).train()
    moved = first.rename(tmp_path / "moved")
    longer = [*plain, "training.total_images=20"]
    trainer = build(load_recipe(None, [*longer, f"model.start_from={moved}"]), run, resume="auto", progress=False)
    assert trainer.train().images_seen == 20
    with pytest.raises(UserError, match="is not what this run started from"):
        build(load_recipe(None, [*longer, f"model.start_from={other}"]), run, resume="auto", progress=False)
    with pytest.raises(UserError, match=r"another model: .*start_from"):
        build(tiny_recipe(photographs, HALF), run, resume="auto", progress=False)


def test_an_average_that_was_not_kept_is_named(photographs, tmp_path):
    build(tiny_recipe(photographs, HALF, "training.ema_decay=0"), tmp_path / "run", progress=False).train()
    with pytest.raises(UserError, match=r"no average of the weights: resume with training.ema_decay=0"):
        build(tiny_recipe(photographs), tmp_path / "run", resume="auto", progress=False)


def test_a_longer_run_keeps_the_start_that_was_open_beside_a_given_one(photographs, tmp_path):
    """Else a discriminator that trains already would stop for a while."""
    settings = ("loss.discriminator_start=null", "loss.adversarial_start=16")
    first = build(tiny_recipe(photographs, *settings, HALF), tmp_path / "run", progress=False)
    first.train()
    longer = tiny_recipe(photographs, *settings, "training.total_images=64")
    second = build(longer, tmp_path / "run", resume="auto", progress=False)
    assert second.settings["loss"]["discriminator_start"] == first.settings["loss"]["discriminator_start"] == 6
    anew = tiny_recipe(photographs, "loss.discriminator_start=null", "loss.adversarial_start=4")
    assert build(anew, tmp_path / "run", resume="auto", progress=False).settings["loss"]["discriminator_start"] == 4


def break_at(monkeypatch, images):
    """Make the loss NaN on the step after so many images."""
    generator = Objective.generator

    def broken(self, *arguments, images_seen, **options):
        result = generator(self, *arguments, images_seen=images_seen, **options)
        if images_seen == images:
            result.terms["reconstruction"] = result.terms["reconstruction"] * float("nan")
        return result

    monkeypatch.setattr(Objective, "generator", broken)


def test_the_command_tells_what_was_not_finite_in_one_line(photographs, tmp_path, monkeypatch, capsys):
    break_at(monkeypatch, 4)
    (tmp_path / "recipe.yaml").write_text("{}\n", encoding="utf-8")
    command = ["train", "--recipe", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="2"):
        cli.main([*command, *(part for setting in tiny_settings(photographs) for part in ("--set", setting))])
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "not finite after 4 images: reconstruction of " in error and "lower training.learning_rate" in error


def test_a_rollback_to_before_the_decoder_only_finish_freezes_the_encoder_that_is_shipped(
    photographs, tmp_path, monkeypatch
):
    settings = ("training.on_nonfinite=rollback", "training.save_every_images=8", "training.decoder_only_start=12")
    break_at(monkeypatch, 12)  # the newest checkpoint is that of 8
    result = build(tiny_recipe(photographs, *settings), tmp_path / "run", progress=False).train()
    trained, shipped = (
        {
            name: tensor
            for name, tensor in load_file(folder / "diffusion_pytorch_model.safetensors").items()
            if name.startswith(("encoder.", "quant_conv."))
        }
        for folder in (result.checkpoint / "model", result.model_folder)
    )
    assert_bit_identical(trained, shipped)


def test_a_run_from_anothers_checkpoint_rolls_back_to_that(photographs, tmp_path, monkeypatch):
    other = build(tiny_recipe(photographs, HALF), tmp_path / "other", progress=False).train()
    break_at(monkeypatch, 20)
    recipe = tiny_recipe(photographs, "training.on_nonfinite=rollback")
    trainer = build(recipe, tmp_path / "run", resume=other.checkpoint, progress=False)
    assert trainer.train().reason == "finished" and trainer.updater.num_nonfinite == 1
    assert all(torch.isfinite(parameter).all() for parameter in trainer.vae.parameters())
