"""What the trainer does around its updates: roll back, end again, make up for a validation, settle the encoder."""

import json
import logging
import subprocess
import sys

import psutil
import pytest
import torch
from safetensors.torch import load_file

from latentvae.assembly import build
from latentvae.errors import UserError
from latentvae.files import write_json
from latentvae.losses.objective import Objective
from latentvae.training.run_dir import RunDirectory
from latentvae.training.update import NonFiniteLoss
from tests.training.process_runs import assert_bit_identical, tensors_below
from tests.training.recipes import tiny_recipe


def broken_at(monkeypatch, *images):
    """Let the loss of the steps that begin after so many images be NaN."""
    real = Objective.generator

    def generator(self, images_, output, *, images_seen, **options):
        result = real(self, images_, output, images_seen=images_seen, **options)
        if images_seen in images:
            result.terms["reconstruction"] = result.terms["reconstruction"] * float("nan")
        return result

    monkeypatch.setattr(Objective, "generator", generator)


def test_rollback_goes_on_from_the_last_checkpoint_with_the_next_images(photographs, tmp_path, monkeypatch, caplog):
    settings = ("training.on_nonfinite=rollback", "training.save_every_images=8", "training.keep_checkpoints=9")
    broken_at(monkeypatch, 20)
    trainer = build(tiny_recipe(photographs, *settings), tmp_path / "run", progress=False)
    seen = []
    update = trainer.updater.update
    monkeypatch.setattr(
        trainer.updater,
        "update",
        lambda batches, images, **options: seen.append(images) or update(batches, images, **options),
    )
    with caplog.at_level(logging.WARNING, "latentvae"):
        result = trainer.train()
    assert result.reason == "finished" and seen == list(range(0, 32, 4)), "no image twice"
    assert "Back to the weights of" in caplog.text and "000000016" in caplog.text
    assert json.loads((result.checkpoint / "state.json").read_text())["num_nonfinite"] == 1

    # the same as stopping at 16, and going on at 24 with the weights of 16
    monkeypatch.undo()
    other = build(tiny_recipe(photographs, *settings, "training.total_images=16"), tmp_path / "other", progress=False)
    kept = ("loss.discriminator_start=8", "loss.adversarial_start=16")
    checkpoint = other.train().checkpoint
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps(state | {"images_seen": 24}))
    checkpoint.rename(checkpoint.with_name("000000024"))
    resumed = build(
        tiny_recipe(photographs, *settings, *kept), tmp_path / "other", resume="auto", progress=False
    ).train()
    assert_bit_identical(tensors_below(result.checkpoint), tensors_below(resumed.checkpoint))


def test_rollback_without_a_checkpoint_or_too_often_ends_the_run(photographs, tmp_path, monkeypatch):
    broken_at(monkeypatch, 4)
    trainer = build(tiny_recipe(photographs, "training.on_nonfinite=rollback"), tmp_path / "early", progress=False)
    with pytest.raises(NonFiniteLoss, match="reconstruction of"):
        trainer.train()
    monkeypatch.undo()
    settings = ("training.on_nonfinite=rollback", "training.max_nonfinite=2", "training.save_every_images=4")
    broken_at(monkeypatch, 8, 12, 16)
    recipe = tiny_recipe(photographs, *settings)
    with pytest.raises(NonFiniteLoss):
        build(recipe, tmp_path / "often", progress=False).train()
    assert (tmp_path / "often" / "checkpoints" / "000000012").is_dir()


def test_a_run_that_has_finished_says_so_and_stops(photographs, tmp_path, caplog):
    recipe = tiny_recipe(photographs)
    first = build(recipe, tmp_path / "run", progress=False).train()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "model").iterdir()}
    with caplog.at_level(logging.INFO, "latentvae"):
        again = build(recipe, tmp_path / "run", resume="auto", progress=False).train()
    assert "this run has finished: finished after 32 images" in caplog.text
    assert again == first
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "model").iterdir()}


def test_a_finished_run_without_its_model_writes_it(photographs, tmp_path):
    recipe = tiny_recipe(photographs)
    first = build(recipe, tmp_path / "run", progress=False).train()
    weights = load_file(first.model_folder / "diffusion_pytorch_model.safetensors")
    (first.model_folder / "metrics.json").unlink()  # as if it had been another's, before the end
    build(recipe, tmp_path / "run", resume="auto", progress=False).train()
    again = load_file(first.model_folder / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    assert json.loads((first.model_folder / "metrics.json").read_text())["images_seen"] == 32


def test_a_stop_where_a_validation_is_due_loses_none(photographs, tmp_path):
    settings = ("training.validate_every_images=8", "training.keep_checkpoints=9")
    straight = build(tiny_recipe(photographs, *settings), tmp_path / "straight", progress=False).train()
    trainer = build(tiny_recipe(photographs, *settings), tmp_path / "stopped", progress=False)
    update = trainer.updater.update

    def stopped(batches, images, **options):
        terms = update(batches, images, **options)
        trainer.updater.stop_agreed = images == 12  # the step that ends at 16, where a validation is due
        return terms

    trainer.updater.update = stopped
    assert trainer.train().images_seen == 16
    resumed = build(tiny_recipe(photographs, *settings), tmp_path / "stopped", resume="auto", progress=False).train()

    def validations(name):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [(row["images_seen"], row["validation_psnr"]) for row in rows if "validation_psnr" in row]

    assert validations("stopped") == validations("straight")
    assert [images for images, _ in validations("stopped")] == [8, 16, 24, 32]
    assert_bit_identical(tensors_below(straight.checkpoint), tensors_below(resumed.checkpoint))


def test_the_decoder_finishes_on_the_averaged_encoder(photographs, tmp_path):
    settings = ("training.decoder_only_start=16", "training.save_every_images=8", "training.keep_checkpoints=9")
    run = tmp_path / "run"
    result = build(tiny_recipe(photographs, *settings), run, progress=False).train()

    def encoder(folder):
        tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
        return {name: tensor for name, tensor in tensors.items() if name.startswith(("encoder.", "quant_conv."))}

    averages = encoder(run / "checkpoints" / "000000016" / "ema")
    assert any(
        not torch.equal(averages[name], t) for name, t in encoder(run / "checkpoints" / "000000016" / "model").items()
    )
    for later in (run / "checkpoints" / "000000024" / "model", result.checkpoint / "ema", result.model_folder):
        assert_bit_identical(averages, encoder(later))
    stopped = tmp_path / "stopped"
    build(
        tiny_recipe(photographs, *settings, "training.total_images=16", "loss.discriminator_start=8"),
        stopped,
        progress=False,
    ).train()
    resumed = build(tiny_recipe(photographs, *settings), stopped, resume="auto", progress=False).train()
    assert_bit_identical(tensors_below(result.checkpoint), tensors_below(resumed.checkpoint))


def test_auto_measures_once_and_a_resume_keeps_it(photographs, tmp_path, monkeypatch):
    auto = "training.micro_batch_size=auto"
    monkeypatch.setattr("latentvae.training.update.Updater.largest_micro_batch", lambda *_: 2)
    first = build(tiny_recipe(photographs, auto, "training.total_images=16"), tmp_path / "run", progress=False)
    assert first.micro_batch == {"num_processes": 1, "size": 2} and first.accelerator.gradient_accumulation_steps == 2
    first.train()

    def refuse(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr("latentvae.training.update.Updater.largest_micro_batch", refuse)
    second = build(tiny_recipe(photographs, auto), tmp_path / "run", resume="auto", progress=False)
    assert second.micro_batch["size"] == 2 and second.accelerator.gradient_accumulation_steps == 2


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["training.trainable=decoder"], "training.trainable is for fine-tuning: pass --set model.start_from"),
        (["loss.anchor_weight=1.0"], "loss.anchor_weight is for fine-tuning"),
        (["training.lora.rank=4"], "training.lora is for fine-tuning"),
        (["training.best_metric=lpips"], "best_metric is lpips, which needs loss.perceptual"),
        (["loss.ssim_weight=1.0", "data.resolution=8"], "11"),
    ],
)
def test_what_does_not_fit_is_told_before_any_work(photographs, tmp_path, settings, told):
    with pytest.raises(UserError, match=told) as caught:
        build(tiny_recipe(photographs, *settings), tmp_path / "run", progress=False)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_second_trainer_in_a_run_is_refused(photographs, tmp_path):
    recipe, run = tiny_recipe(photographs), RunDirectory(tmp_path / "run")
    build(recipe, run.path, progress=False).train()
    longer = tiny_recipe(photographs, "training.total_images=36", "loss.discriminator_start=8")
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        started = psutil.Process(sleeper.pid).create_time()
        status = run.read_status() | {"state": "running", "process": sleeper.pid, "process_started": started}
        write_json(run.status, status)
        before = run.recipe.read_bytes()
        with pytest.raises(UserError, match=f"process {sleeper.pid} is training in"):
            build(longer, run.path, resume="auto", progress=False)
        assert run.recipe.read_bytes() == before
        write_json(run.status, status | {"process_started": started - 100})  # another process has its number now
        build(longer, run.path, resume="auto", progress=False)
        write_json(run.status, status)
    finally:
        sleeper.communicate(b"\n")
    assert build(longer, run.path, resume="auto", progress=False).train().images_seen == 36  # it was killed
