"""Stages and aspect-ratio buckets in a whole training: several processes, and a resume on another number of them."""

import numpy as np
import pytest
from PIL import Image

from tests.training.process_runs import (
    GLOBAL_BATCH,
    WHOLE_STEP,
    largest_difference,
    newest,
    run,
    start,
    tensors_below,
    trained_until,
    weights_of,
)

pytestmark = pytest.mark.multiprocess
SHAPES = ((60, 40), (40, 60), (50, 50))  # width, height
SETTINGS = (
    *WHOLE_STEP,
    "data.resolution=32",
    f"data.curriculum=[{{from_image: 0, resolution: 16}}, {{from_image: {2 * GLOBAL_BATCH}, resolution: 32}}]",
    "data.aspect_buckets={multiple_of: 4}",
)


@pytest.fixture
def shapes(tmp_path):
    """A folder of 72 noisy pictures in three shapes: each fills its bucket."""
    generator = np.random.default_rng(0)
    (tmp_path / "shapes").mkdir()
    for index in range(72):
        width, height = SHAPES[index % len(SHAPES)]
        picture = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "shapes" / f"{index:02d}.png")
    return tmp_path / "shapes"


def test_any_number_of_processes_and_a_resume_train_the_same_weights(shapes, tmp_path):
    one = run(1, shapes, tmp_path / "one", *SETTINGS)
    two = run(2, shapes, tmp_path / "two", *SETTINGS)
    assert largest_difference(tensors_below(newest(one)), tensors_below(newest(two))) < 1e-9
    out = tmp_path / "resumed"
    start(tmp_path / "said", 3, trained_until, shapes, out, SETTINGS, 1, 3 * GLOBAL_BATCH).require_success()
    assert largest_difference(weights_of(one, 0), weights_of(run(2, shapes, out, *SETTINGS, resume="auto"), 0)) < 1e-9
    squares = run(1, shapes, tmp_path / "squares", *SETTINGS[:-1])
    assert largest_difference(weights_of(one, 0), weights_of(squares, 0)) > 1e-6
