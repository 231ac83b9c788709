"""Noise that depends on its key alone."""

import numpy as np
import pytest
import torch

from latentvae.keyed import keyed_noise


def test_noise_depends_on_the_key_alone():
    noise = keyed_noise((4, 8, 8), 7, "a.png")
    assert noise.shape == (4, 8, 8) and noise.dtype == torch.float32
    keyed_noise((4, 8, 8), 1)
    assert torch.equal(keyed_noise((4, 8, 8), 7, "a.png"), noise)
    for other in [(8, "a.png"), (7, "b.png"), ("a.png", 7), (7,)]:
        assert not torch.equal(keyed_noise((4, 8, 8), *other), noise)
    assert len({keyed_noise((4, 2, 2), 7, index).numpy().tobytes() for index in range(500)}) == 500


def test_noise_does_not_touch_the_global_generators():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    keyed_noise((4, 8, 8), 0)
    assert torch.equal(torch.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]


def test_noise_is_standard_normal_and_independent():
    noise = torch.stack([keyed_noise((4, 16, 16), 3, index) for index in range(400)]).flatten(1).double()
    flat = noise.flatten()
    assert abs(flat.mean()) < 0.01 and abs(flat.std() - 1) < 0.01
    assert abs(flat.pow(3).mean()) < 0.03 and abs(flat.pow(4).mean() - 3) < 0.05
    assert abs((noise[:-1] * noise[1:]).mean()) < 0.01


def test_noise_is_the_same_in_every_version():
    """A resumed run must continue with the numbers it would have had: these are pinned."""
    assert keyed_noise((4, 8, 8), 5, 123456789).flatten()[-2:].tolist() == pytest.approx([0.313637, 1.458814], abs=1e-6)
