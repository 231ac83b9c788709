"""Raw and normalized latents, by hand and by the formulas of the pipelines."""

import json
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


def test_squares_become_channels_by_hand():
    """Channel 0 holds 0..3 and channel 1 holds 4..7, row by row: each position of the square has its own statistics."""
    scaling = LatentScaling(mean=tuple(map(float, range(8))), std=(1.0,) * 4 + (2.0,) * 4, patch=2)
    raw = torch.arange(8.0).reshape(2, 2, 2) + 10
    normalized = scaling.normalize(raw)
    assert normalized.shape == (8, 1, 1)
    assert normalized.flatten().tolist() == [10.0] * 4 + [5.0] * 4
    assert torch.equal(scaling.denormalize(normalized), raw)
    batch = torch.randn(3, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    assert scaling.normalize(batch).shape == (3, 8, 2, 3)
    assert torch.equal(scaling.normalize(batch)[1, :, 1, 2], scaling.normalize(batch[1, :, 2:4, 4:6]).flatten())
    with pytest.raises(UserError, match="multiples of 2"):
        scaling.normalize(torch.zeros(1, 2, 4, 5))


@pytest.mark.parametrize(
    "scaling",
    [
        LatentScaling(scale=0.18215, shift=0.1 + 0.2),
        LatentScaling(mean=(1 / 3, -0.0), std=(1e-30, math.pi), scale=2.0),
        LatentScaling(mean=(0.1,) * 4, std=(0.7,) * 4, patch=2),
    ],
)
def test_dict_and_back_is_exact(scaling):
    values = json.loads(json.dumps(scaling.to_dict()))
    assert LatentScaling.from_dict(values) == scaling
    assert set(values) == {"scale", "shift", "mean", "std", "patch"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"new": 1}, "are needed"),
        ({"scale": "wide"}, "not a number"),
        ({"scale": 0.0}, "may be 0"),
        ({"scale": math.nan}, "must be finite"),
        ({"mean": [0.0], "std": [0.0]}, "may be 0"),
        ({"mean": [0.0]}, "or neither"),
        ({"mean": [0.0], "std": [1.0, 1.0]}, "same channels"),
        ({"patch": 0}, "whole number"),
        ({"patch": 1.5}, "whole number"),
    ],
)
def test_a_damaged_dict_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        LatentScaling.from_dict(LatentScaling().to_dict() | changes)
    with pytest.raises(UserError, match="are needed"):
        LatentScaling.from_dict({"scale": 1.0})
