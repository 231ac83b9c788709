"""Run by torchrun from test_phases.py: FOLDER => the weights of each process after all phases of a run."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.training.updaters import make_updater, run, weights

TRAINING = {"decoder_only_start": 16}
LOSS = {
    "autoencoder_start": 8,
    "adversarial_start": 12,
    "adversarial_balance": "constant",  # the adaptive weight belongs to a forward of all processes
    "likelihood": "learned",
    "equivariance": 0.5,
    "equivariance_scales": (16, 31),
    "latent_noise": 0.5,
}


def main(out: Path) -> None:
    updater = make_updater(TRAINING, LOSS, dtype=torch.float64)
    assert updater.largest_micro_batch(2, 16, 16) == 2  # no process waits for another in it, and nothing changes
    run(updater, 7)
    save_file(
        {name: tensor.contiguous() for name, tensor in weights(updater).items()},
        out / f"{updater.accelerator.process_index}.safetensors",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
