"""Shared fixtures: where the real images and weights lie, and what a machine must have for a test."""

import os
from pathlib import Path

import pytest
import torch

SHARED = Path(os.environ.get("LATENTVAE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
TORCH_HOME = SHARED.parent / "torch_home"

# Tiny tensors: one thread each, and as many test processes as there are cores (pytest -n).
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def shared_data():
    """A function name -> folder of real images; skips where the images are absent."""

    def folder(name: str) -> Path:
        path = SHARED / name
        if not path.is_dir():
            pytest.skip(f"real images absent: {name} is not in {SHARED} (set LATENTVAE_TEST_DATA)")
        return path

    return folder


@pytest.fixture
def lpips_home(monkeypatch):
    """Point torch at the SqueezeNet weights that a real LPIPS needs; skips where they are absent."""
    if not (TORCH_HOME / "hub" / "checkpoints").is_dir():
        pytest.skip(f"LPIPS backbone weights absent: {TORCH_HOME}")
    monkeypatch.setenv("TORCH_HOME", str(TORCH_HOME))
    return TORCH_HOME


@pytest.fixture
def photographs(tmp_path):
    """A folder of twelve small synthetic colour pictures in nested folders (PNG and JPEG)."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    y, x = np.mgrid[0:72, 0:96] / 96.0
    for index in range(12):
        a, b, c = generator.uniform(1, 9, 3)
        channels = [np.sin(a * x + index), np.cos(b * y), np.sin(c * (x + y))]
        array = ((np.stack(channels, -1) * 0.5 + 0.5) * 255).astype(np.uint8)
        folder = tmp_path / "photographs" / f"class_{index % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / f"image_{index:02d}{'.png' if index % 2 else '.jpg'}")
    return tmp_path / "photographs"
