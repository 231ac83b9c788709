"""Raw and normalized latents, by hand and by the formulas of the pipelines."""

import math

import pytest
import torch

from latentvae.errors import UserError
from latentvae.model.scaling import LatentScaling

CONFIG = {"latent_channels": 2, "scaling_factor": 0.5, "shift_factor": None, "latents_mean": None, "latents_std": None}


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, [1.0, 2.0]),  # SD 1.x: raw * scale
        ({"shift_factor": 1.0}, [0.5, 1.5]),  # SD3, FLUX: (raw - shift) * scale
        ({"latents_mean": [1.0, 2.0], "latents_std": [2.0, 4.0]}, [0.25, 0.25]),  # SDXL: (raw - mean) * scale / std
    ],
)
def test_both_directions_by_hand(changes, expected):
    scaling = LatentScaling.from_config(CONFIG | changes)
    raw = torch.tensor([2.0, 4.0]).reshape(2, 1, 1)
    normalized = scaling.normalize(raw)
    assert normalized.flatten().tolist() == expected
    assert scaling.denormalize(normalized).flatten().tolist() == [2.0, 4.0]
    batch = raw.expand(3, 2, 4, 4)
    assert torch.equal(scaling.normalize(batch)[1, :, 2, 3], normalized.flatten())
    assert scaling.normalize(raw.half()).dtype == torch.float16


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"latents_mean": [0.0, 0.0]}, "no latents_std"),
        ({"latents_std": [1.0, 1.0]}, "no latents_mean"),
        ({"latents_mean": [0.0], "latents_std": [1.0]}, "latent_channels is 2"),
        ({"latents_mean": [0.0, 0.0], "latents_std": [1.0, 1.0], "shift_factor": 0.1}, "one or the other"),
        ({"latents_mean": [0.0, 0.0], "latents_std": [1.0, 0.0]}, "a 0 in latents_std"),
        ({"scaling_factor": 0}, "erase"),
        ({"scaling_factor": math.nan}, "not finite"),
        ({"latents_mean": [0.0, 0.0], "latents_std": [1.0, math.inf]}, "not finite"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        LatentScaling.from_config(CONFIG | changes)
