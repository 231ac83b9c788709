"""Several processes compute what one does: proven in float64, over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latentvae.assembly import build
from tests.training.process_runs import (
    GLOBAL_BATCH,
    WHOLE_STEP,
    assert_bit_identical,
    finish,
    largest_difference,
    newest,
    recipe_file,
    run,
    start,
    tensors_below,
    weights_of,
)
from tests.training.recipes import tiny_recipe

pytestmark = pytest.mark.multiprocess
CONSTANT = ("loss.adversarial_balance=constant", "loss.adversarial_weight=0.1")
LPIPS = ("data.resolution=32", "loss.perceptual=squeeze", "loss.kl_weight=1e-3")


def bypass(source: Path, out: Path, settings: tuple[str, ...], network: str) -> None:
    """Train with the planted mistake: one network is called past the wrapper that averages its gradients."""
    trainer = build(tiny_recipe(source, *settings), out, progress=False)
    wrapped = getattr(trainer.updater, network)
    setattr(trainer.updater, network, trainer.accelerator.unwrap_model(wrapped))
    finish(trainer, out)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """A function settings => the folder of a run by one process, made once."""
    runs: dict[tuple[str, ...], Path] = {}

    def folder(source, *settings):
        if settings not in runs:
            runs[settings] = run(1, source, tmp_path_factory.mktemp("one") / "run", *settings)
        return runs[settings]

    return folder


@pytest.mark.parametrize("processes", [2, 3])
def test_with_every_term_weights_are_those_of_one_process(photographs, tmp_path, lpips_home, one_process, processes):
    """LPIPS, KL, the adaptive adversarial weight, the average, augmentation and workers, all of it from step one."""
    one = one_process(photographs, *WHOLE_STEP, *LPIPS)
    many = run(processes, photographs, tmp_path / "many", *WHOLE_STEP, *LPIPS)
    for rank in range(1, processes):
        assert_bit_identical(weights_of(many, 0), weights_of(many, rank))
    a, b = tensors_below(newest(one)), tensors_below(newest(many))
    assert {name.partition(":")[0] for name in a} == {
        "autoencoder_optimizer.safetensors",
        "discriminator.safetensors",
        "discriminator_optimizer.safetensors",
        "ema/diffusion_pytorch_model.safetensors",
        "model/diffusion_pytorch_model.safetensors",
    }
    assert largest_difference(a, b) < 1e-9
    assert newest(one).name == f"{5 * GLOBAL_BATCH:09d}"
    weights, start = weights_of(many, 0), build(tiny_recipe(photographs, *WHOLE_STEP, *LPIPS), tmp_path / "start")
    for name, network in start.networks.items():  # both networks did go somewhere
        before = {f"{name}.{key}": value for key, value in network.module.state_dict().items()}
        assert largest_difference(before, {key: weights[key] for key in before}) > 1e-4


@pytest.mark.parametrize("network", ["step", "discriminator"])
def test_a_forward_past_the_wrapper_is_found_out(photographs, tmp_path, one_process, network):
    """What unwrap_model(...) in the step does elsewhere: gradients are not averaged and the replicas drift apart."""
    one = one_process(photographs, *WHOLE_STEP)
    right = run(2, photographs, tmp_path / "right", *WHOLE_STEP)
    assert largest_difference(weights_of(one, 0), weights_of(right, 0)) < 1e-9
    wrong = tmp_path / "wrong"
    start(tmp_path / "said", 2, bypass, photographs, wrong, WHOLE_STEP, network).require_success()
    assert largest_difference(weights_of(wrong, 0), weights_of(wrong, 1)) > 1e-6
    assert largest_difference(weights_of(one, 0), weights_of(wrong, 0)) > 1e-6


@pytest.mark.parametrize("processes", [1, 2])
def test_accumulation_equals_one_large_batch(photographs, tmp_path, one_process, processes):
    """With a constant adversarial weight: an adaptive one belongs to one forward."""
    one = one_process(photographs, *WHOLE_STEP, *CONSTANT)
    halves = (*WHOLE_STEP, *CONSTANT, f"training.micro_batch_size={GLOBAL_BATCH // processes // 2}")
    accumulated = run(processes, photographs, tmp_path / "accumulated", *halves)
    assert largest_difference(tensors_below(newest(one)), tensors_below(newest(accumulated))) < 1e-9


def first_gradients(out: Path) -> torch.Tensor:
    """The gradients of the first step, from the first moments of AdamW: (1 - beta_1) times them."""
    found = []
    for file in sorted(newest(out).glob("*_optimizer.safetensors")):
        tensors = load_file(file)
        found += [value.flatten() / (1 - 0.9) for name, value in sorted(tensors.items()) if name.startswith("exp_avg/")]
    return torch.cat(found).double()


@pytest.mark.parametrize("processes", [2, 3])
def test_in_float32_the_first_gradients_agree(photographs, tmp_path, one_process, processes):
    settings = (
        *WHOLE_STEP,
        "training.parameter_dtype=float32",
        "training.mixed_precision=no",
        "training.betas=[0.9,0.95]",
        "training.max_grad_norm=1e9",
        f"training.total_images={GLOBAL_BATCH}",
    )
    one = first_gradients(one_process(photographs, *settings))
    many = first_gradients(run(processes, photographs, tmp_path / "many", *settings))
    assert one.norm() > 1e-3
    assert (one - many).norm() / one.norm() < 1e-4


def figures(out: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl, without what depends on clock and machine."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    loose = ("per_second", "seconds", "bytes")
    return [{name: value for name, value in row.items() if not name.endswith(loose)} for row in rows]


def test_figures_are_those_of_one_process_also_of_uneven_shares(photographs, tmp_path, one_process):
    """7 validation images over 3 processes, in batches of 2: two shares of 2 and one of 3."""
    held_out = photographs.parent / "held_out"
    held_out.mkdir()
    for path in sorted(photographs.rglob("*.*"))[:7]:
        (held_out / path.name).write_bytes(path.read_bytes())
    settings = (
        *WHOLE_STEP,
        f"validation.source={held_out}",
        "validation.batch_size=2",
        "training.validate_every_images=24",
        "training.log_every_images=24",
    )
    one = run(1, photographs, tmp_path / "one", *settings)
    three = run(3, photographs, tmp_path / "three", *settings)
    for file in ("metrics.json", "config.json"):
        a, b = (json.loads((out / "model" / file).read_text()) for out in (one, three))
        assert a.keys() == b.keys()
        assert all(a[name] == pytest.approx(b[name], abs=1e-9) if isinstance(a[name], float) else True for name in a)
    assert json.loads((three / "model" / "metrics.json").read_text())["validation_images"] == 7
    a, b = figures(one), figures(three)
    assert [row.keys() for row in a] == [row.keys() for row in b] and len(a) >= 5
    different = [
        f"{name}: {row[name]} and {other[name]}"
        for row, other in zip(a, b, strict=True)
        for name in row
        if row[name] != pytest.approx(other[name], rel=1e-6, abs=1e-9)  # the rows are in float32
    ]
    assert not different, different


def test_the_command_line_under_torchrun_does_the_same(photographs, tmp_path, one_process):
    recipe, out = recipe_file(tmp_path / "recipe.yaml", photographs, *WHOLE_STEP), tmp_path / "two"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, "-m", "latentvae", "train", "--recipe", str(recipe), "--out", str(out)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    one = one_process(photographs, *WHOLE_STEP)
    assert largest_difference(tensors_below(newest(one)), tensors_below(newest(out))) < 1e-9


def test_unreadable_images_are_told_whichever_process_met_them(photographs, tmp_path):
    for path in sorted(photographs.rglob("*.png")):
        path.write_bytes(path.read_bytes()[:200])
    settings = (*WHOLE_STEP, f"training.total_images={GLOBAL_BATCH}")
    one, three = (run(count, photographs, tmp_path / str(count), *settings) for count in (1, 3))
    a, b = (sorted((out / "unreadable.csv").read_text().splitlines()) for out in (one, three))
    assert a == b and len(a) >= 5
