"""Whole tiny runs: what is updated, what stays, how a run stops and goes on."""

import json
import math

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from latentvae.assembly import build
from latentvae.errors import UserError
from latentvae.losses.objective import Objective
from latentvae.recipe import load_recipe
from latentvae.training.update import NonFiniteLoss
from tests.training.process_runs import assert_bit_identical, tensors_below
from tests.training.recipes import tiny_recipe


def test_a_run_leaves_a_diffusers_folder_with_measured_scaling(photographs, tmp_path):
    recipe = tiny_recipe(photographs, "training.trackers=[tensorboard]")
    result = build(recipe, tmp_path / "run", progress=False).train()
    assert (result.reason, result.images_seen) == ("finished", 32)
    assert list((tmp_path / "run" / "tensorboard").rglob("events.out.tfevents*"))
    vae = diffusers.AutoencoderKL.from_pretrained(result.model_folder)
    metrics = json.loads((result.model_folder / "metrics.json").read_text())
    assert metrics["images_seen"] == 32 and metrics["psnr"] == result.metrics["psnr"]
    assert vae.config.scaling_factor != 1.0 and vae.config.shift_factor is None
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = [row["validation_latent_std"] for row in rows if "validation_latent_std" in row][-1]
    assert vae.config.scaling_factor == pytest.approx(1 / measured, rel=1e-5)
    assert (tmp_path / "run" / "samples" / "000000032.png").is_file()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_stop_and_resume_is_bit_identical_to_going_on(photographs, tmp_path, precision):
    settings = [f"training.mixed_precision={precision}", "training.save_every_images=16"]
    recipe = tiny_recipe(photographs, *settings, "training.keep_checkpoints=5")
    straight = build(recipe, tmp_path / "straight", progress=False).train()
    first = build(
        tiny_recipe(photographs, *settings, "training.total_images=16", "loss.discriminator_start=8"),
        tmp_path / "resumed",
        progress=False,
    ).train()
    assert first.images_seen == 16
    second = build(recipe, tmp_path / "resumed", resume="auto", progress=False).train()
    assert_bit_identical(tensors_below(straight.checkpoint), tensors_below(second.checkpoint))
    assert_bit_identical(tensors_below(straight.model_folder), tensors_below(second.model_folder))
    assert straight.metrics == second.metrics
    states = [json.loads((result.checkpoint / "state.json").read_text()) for result in (straight, second)]
    assert states[0]["optimizers"] == states[1]["optimizers"]


def test_worker_processes_change_nothing(photographs, tmp_path):
    results = [
        build(tiny_recipe(photographs, f"data.num_workers={n}"), tmp_path / str(n), progress=False).train()
        for n in (0, 2)
    ]
    assert_bit_identical(*(tensors_below(result.checkpoint) for result in results))


def test_every_parameter_is_updated(photographs, tmp_path):
    # A fast critic: while every logit is inside the hinge's margin, the gradient of its last bias is exactly 0.
    settings = "training.discriminator_learning_rate=0.1"
    trainer = build(tiny_recipe(photographs, settings), tmp_path / "run", progress=False)
    before = {n: p.detach().clone() for net in trainer.networks.values() for n, p in net.module.named_parameters()}
    trainer.train()
    after = {n: p for net in trainer.networks.values() for n, p in net.module.named_parameters()}
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_a_frozen_encoder_stays_bit_identical_and_a_fine_tune_keeps_its_scaling(photographs, tmp_path):
    start = build(tiny_recipe(photographs), tmp_path / "start", progress=False).train().model_folder
    overrides = [
        f"model.start_from={start}",
        f"data.source={photographs}",
        "data.resolution=16",
        "data.num_workers=0",
        "loss.perceptual=none",
        "training.total_images=16",
        "training.global_batch_size=4",
        "training.trackers=[]",
        "training.trainable=decoder",
        "training.mixed_precision=no",
        "validation.fraction=0.25",
    ]
    result = build(load_recipe(None, overrides), tmp_path / "tuned", progress=False).train()
    old, new = (
        diffusers.AutoencoderKL.from_pretrained(start),
        diffusers.AutoencoderKL.from_pretrained(result.model_folder),
    )
    assert new.config.scaling_factor == old.config.scaling_factor
    frozen = {n: torch.equal(p, new.get_parameter(n)) for n, p in old.named_parameters()}
    for name, equal in frozen.items():
        assert equal == name.startswith(("encoder.", "quant_conv.")), name


def test_accumulation_equals_one_large_batch(photographs, tmp_path):
    settings = ["training.parameter_dtype=float64", "loss.adversarial_balance=constant", "loss.adversarial_weight=0.1"]
    models = [
        build(tiny_recipe(photographs, *settings, f"training.micro_batch_size={n}"), tmp_path / str(n), progress=False)
        .train()
        .checkpoint
        for n in (4, 1)
    ]
    a, b = (tensors_below(model / "model") for model in models)
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-9


@pytest.mark.parametrize("term", ["reconstruction", "discriminator"])
def test_a_planted_nan_stops_before_the_update_and_names_the_term(photographs, tmp_path, monkeypatch, term):
    trainer = build(tiny_recipe(photographs, "training.save_every_images=4"), tmp_path / "run", progress=False)
    method = "generator" if term == "reconstruction" else "discriminator"
    original, calls = getattr(Objective, method), []

    def poisoned(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        calls.append(term)
        if len(calls) == 5:
            result.loss.data.fill_(math.nan)
            result.terms[term][1] = math.nan
        return result

    monkeypatch.setattr(Objective, method, poisoned)
    with pytest.raises(NonFiniteLoss, match=rf"{term} of class_\d/image_\d\d"):
        trainer.train()
    newest = trainer.run.all_checkpoints()[-1]
    saved = load_file(newest / "model" / "diffusion_pytorch_model.safetensors")
    for name, parameter in trainer.vae.named_parameters():
        assert torch.equal(saved[name], parameter), name


def test_sixteen_bit_grayscale_never_becomes_rgb(tmp_path):
    generator = np.random.default_rng(0)
    folder = tmp_path / "scans"
    folder.mkdir()
    for index in range(8):
        Image.fromarray(generator.integers(0, 65536, (24, 24)).astype(np.uint16)).save(folder / f"{index}.png")
    settings = ["model.in_channels=1", "model.out_channels=1", "data.dtype=uint16", "validation.fraction=0.5"]
    result = build(tiny_recipe(folder, *settings), tmp_path / "run", progress=False).train()
    assert diffusers.AutoencoderKL.from_pretrained(result.model_folder).config.in_channels == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.resolution=17", "data.resolution is 17; the model needs a multiple of 2"),
        ("data.source=nowhere", "nowhere"),
        ("model.out_channels=1", "must agree"),
        ("loss.discriminator.num_layers=4", "16 pixels a side; a discriminator of 4 layers needs 48"),
        ("loss.perceptual=alex", "16 pixels a side; LPIPS-alex needs 31"),
        ("training.trackers=[wandb]", "wandb; usable here are tensorboard"),
        ("training.trackers=[nonsense]", "nonsense; usable here are tensorboard"),
        ("training.mixed_precision=fp16", "fp16, which a CPU does not train in"),
    ],
)
def test_bad_input_is_told_before_any_work(photographs, tmp_path, monkeypatch, setting, message):
    monkeypatch.setattr("latentvae.recipe.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(UserError, match=message):
        build(tiny_recipe(photographs, setting), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_the_micro_batch_is_a_divisor_and_the_global_batch_a_multiple(photographs):
    training = tiny_recipe(photographs, "training.global_batch_size=12", "training.micro_batch_size=5").training
    assert training.accumulation(1) == (4, 3)
    with pytest.raises(UserError, match="must be a multiple of 8"):
        training.accumulation(8)


def test_one_image_is_held_out_of_a_small_set(photographs, tmp_path):
    recipe = tiny_recipe(photographs, "validation.fraction=0.001", "training.total_images=4")
    assert build(recipe, tmp_path / "run", progress=False).train().metrics["psnr"] > 0


def test_resuming_a_finished_run_keeps_its_checkpoint_and_renews_the_model(photographs, tmp_path):
    recipe = tiny_recipe(photographs, "training.total_images=4")
    first = build(recipe, tmp_path / "run", progress=False).train()
    before = {path: path.stat().st_mtime_ns for path in first.checkpoint.rglob("*")}
    metrics = (first.model_folder / "metrics.json").read_text()
    (first.model_folder / "metrics.json").unlink()
    again = build(recipe, tmp_path / "run", resume="auto", progress=False).train()
    assert again.reason == "finished" and again.metrics == first.metrics
    assert (again.model_folder / "metrics.json").read_text() == metrics
    assert {path: path.stat().st_mtime_ns for path in first.checkpoint.rglob("*")} == before


def test_a_longer_run_keeps_the_starts_it_had(photographs, tmp_path):
    starts = ("loss.discriminator_start=null", "loss.adversarial_start=null")
    for total, resume in ((16, None), (32, "auto")):
        recipe = tiny_recipe(photographs, *starts, f"training.total_images={total}")
        trainer = build(recipe, tmp_path / "run", resume=resume, progress=False)
        trainer.train()
        loss = trainer.settings["loss"]
        assert (loss["discriminator_start"], loss["adversarial_start"]) == (6, 8)


def test_max_minutes_ends_the_run_and_more_minutes_continue_it(photographs, tmp_path):
    recipe = tiny_recipe(photographs, "training.max_minutes=1e-6")
    first = build(recipe, tmp_path / "run", progress=False).train()
    assert (first.reason, first.images_seen) == ("max_minutes", 4) and first.model_folder.is_dir()
    again = build(recipe, tmp_path / "run", resume="auto", progress=False).train()
    assert (again.reason, again.images_seen) == ("max_minutes", 4)
    longer = tiny_recipe(photographs, "training.max_minutes=9")
    assert build(longer, tmp_path / "run", resume="auto", progress=False).train().reason == "finished"


def test_unreadable_images_are_counted_and_named_also_in_validation(photographs, tmp_path):
    for name in ("class_0/bad.png", "held.png"):
        (photographs / name).write_bytes(b"no picture")
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    for name in ("good.png", "bad.png"):
        (held_out / name).write_bytes(
            (photographs / ("class_1/image_01.png" if name == "good.png" else "held.png")).read_bytes()
        )
    recipe = tiny_recipe(photographs, f"validation.source={held_out}")
    result = build(recipe, tmp_path / "run", progress=False).train()
    table = (tmp_path / "run" / "unreadable.csv").read_text().splitlines()
    assert sorted(line.split(",")[0] for line in table[1:]) == ["bad.png", "class_0/bad.png", "held.png"]
    assert "skipped bad.png" in (tmp_path / "run" / "log.txt").read_text()
    assert result.reason == "finished"


def test_a_set_without_a_readable_image_is_one_error_that_the_log_keeps(tmp_path, caplog):
    folder = tmp_path / "broken"
    folder.mkdir()
    for index in range(9):
        (folder / f"{index}.png").write_bytes(b"no picture")
    trainer = build(tiny_recipe(folder), tmp_path / "run", progress=False)
    with pytest.raises(UserError, match=r"no readable image was found in .*broken"):
        trainer.train()
    assert "UserError: no readable image" in (tmp_path / "run" / "log.txt").read_text()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]  # the command line prints it


def test_what_is_not_a_state_is_refused(photographs, tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "state.json").write_text('{"images_seen": 3}')
    with pytest.raises(UserError, match="not written by a training run"):
        build(tiny_recipe(photographs), tmp_path / "run", resume=tmp_path / "foreign", progress=False)


def test_a_run_is_never_overwritten_and_a_missing_checkpoint_is_an_error(photographs, tmp_path):
    recipe = tiny_recipe(photographs, "training.total_images=4")
    build(recipe, tmp_path / "run", progress=False).train()
    with pytest.raises(UserError, match="--resume auto"):
        build(recipe, tmp_path / "run", progress=False)
    with pytest.raises(UserError, match="is not a checkpoint"):
        build(recipe, tmp_path / "run", resume=tmp_path / "run" / "checkpoints" / "5", progress=False)
    with pytest.raises(UserError, match="another model"):
        other = tiny_recipe(photographs, "model.latent_channels=8", "training.total_images=4")
        build(other, tmp_path / "run", resume="auto", progress=False)
