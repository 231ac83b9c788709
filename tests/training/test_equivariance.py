"""EQ-VAE's fine-tune does what it is for: as many steps of training with and without it, on smooth pictures."""

import copy

import pytest
import torch
import torch.nn.functional as F

from latentvae.data.pipeline import Batch
from latentvae.training.perturbation import equivariance_error
from latentvae.training.posterior_sigma import fix_posterior
from tests.training.updaters import GLOBAL_BATCH, make_updater, tiny_autoencoder


def picture(index, side=16):
    """(side, side, 3) uint8 without fine detail."""
    coarse = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(index))
    image = F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False).clamp(0, 1)[0]
    return (image.permute(1, 2, 0) * 255).round().to(torch.uint8)


def trained(vae, steps, *, equivariance, learning_rate):
    updater = make_updater(
        {"micro_batch_size": GLOBAL_BATCH, "learning_rate": learning_rate, "weight_decay": 0.0, "total_images": 10**6},
        {"adversarial_weight": 0.0, "equivariance": equivariance, "kl_weight": 0.0, "equivariance_scales": (12, 31)},
        vae=vae,
    )
    for first in range(0, steps * GLOBAL_BATCH, GLOBAL_BATCH):
        positions = list(range(first, first + GLOBAL_BATCH))
        images = torch.stack([picture(position) for position in positions])
        updater.update([Batch(images, [str(p) for p in positions], positions)], first, stop=False)
    return vae


@pytest.mark.slow
def test_a_fine_tune_lowers_the_error_and_keeps_the_reconstruction():
    vae = tiny_autoencoder(mid_block_add_attention=False)
    fix_posterior(vae, 0.02)
    trained(vae, 900, equivariance=0.0, learning_rate=2e-3)
    held_out = torch.stack([picture(10**7 + i) for i in range(32)]).permute(0, 3, 1, 2) / 127.5 - 1
    errors, squares = {}, {}
    for equivariance in (0.0, 0.5):
        copied = copy.deepcopy(vae)
        fix_posterior(copied, 0.02)
        tuned = trained(copied, 400, equivariance=equivariance, learning_rate=1e-3)
        with torch.no_grad():
            errors[equivariance] = equivariance_error(tuned, held_out).mean().item()
            restored = tuned.decode(tuned.encode(held_out).latent_dist.mode()).sample
            squares[equivariance] = (restored - held_out).square().mean().item()
    assert errors[0.5] < 0.8 * errors[0.0]  # measured: 0.68
    assert squares[0.5] < 1.1 * squares[0.0]  # measured: 1.005
