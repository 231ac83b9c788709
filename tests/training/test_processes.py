"""Several processes compute what one does: the first proof of it, in float64, through torchrun and gloo."""

import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from latentvae.config import dump_yaml
from tests.training.recipes import tiny_recipe


def train(processes, out, photographs):
    recipe = out.with_suffix(".yaml")
    settings = ("training.parameter_dtype=float64", "training.micro_batch_size=4")
    recipe.write_text(dump_yaml(tiny_recipe(photographs, *settings)))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *launcher, "-m", "latentvae", "train", "--recipe", str(recipe), "--out", str(out)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    checkpoint = out / "checkpoints" / "000000032"
    autoencoder = load_file(checkpoint / "model" / "diffusion_pytorch_model.safetensors")
    discriminator = load_file(checkpoint / "discriminator.safetensors")
    return autoencoder | {f"discriminator.{name}": tensor for name, tensor in discriminator.items()}


@pytest.mark.multiprocess
def test_two_processes_give_the_weights_of_one(photographs, tmp_path):
    one, two = train(1, tmp_path / "one", photographs), train(2, tmp_path / "two", photographs)
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-9
