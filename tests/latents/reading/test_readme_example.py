"""The diffusion training that README shows runs on a store of several sizes, and learns."""

import re
import statistics
from pathlib import Path

import pytest
import torch

from tests.latents.written import write_store

README = Path(__file__).parents[3] / "README.md"


def example():
    """The one Python block of README that trains a UNet."""
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "UNet2D" in block]
    return block


@pytest.mark.slow
def test_the_example_learns(tmp_path):
    units = [("32x32", [f"a/{n}.png" for n in range(64)]), ("mixed", [f"b/{n}.png" for n in range(60)])]
    made = write_store(tmp_path / "store", units=units, dtype="fp16")
    text = example()
    assert '"stores/mine"' in text
    torch.manual_seed(0)
    names = {}
    exec(compile(text.replace('"stores/mine"', repr(str(made.folder))), str(README), "exec"), names)
    losses = names["losses"]
    steps = len(names["sampler"])
    assert len(losses) == 10 * steps and steps == 10  # 84, 20 and 20 images in batches of 16
    assert losses[0] > 0.8  # nothing is predicted at first, and the noise has a variance of 1
    assert statistics.fmean(losses[-50:]) < 0.5
