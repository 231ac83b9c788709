"""The memory of an encoding does not grow with the number of images."""

import numpy as np
import psutil
import pytest
from PIL import Image

from latentvae.progress import ImageProgress
from tests.latents.stores import tiny_vae

MB = 1e6


@pytest.mark.slow
def test_memory_is_flat_over_five_thousand_images(tmp_path, monkeypatch):
    """JPEG files of 96x72 pixels; this process and its two workers, after 1,000 and after 5,000 images."""
    from latentvae.latents.encoding.encode import encode_dataset

    generator = np.random.default_rng(0)
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(5000):
        coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((96, 72), Image.Resampling.BICUBIC).save(folder / f"{index:04d}.jpg")

    held: dict[int, tuple[float, float]] = {}  # images -> MB of this process, of its workers
    process, update = psutil.Process(), ImageProgress.update

    def watched(self, done, **options):
        update(self, done, **options)
        if done // 500 * 500 not in held:
            workers = sum(child.memory_info().rss for child in process.children(recursive=True))
            held[done // 500 * 500] = process.memory_info().rss / MB, workers / MB

    monkeypatch.setattr(ImageProgress, "update", watched)
    report = encode_dataset(
        folder, tiny_vae(), tmp_path / "store", resolution=64, unit_images=250, batch_size=16, num_workers=2,
        device="cpu", progress=False,
    )  # fmt: skip
    assert report.counts.ok == 5000 and {1000, 5000} <= held.keys()
    grown = held[5000][0] - held[1000][0], held[4500][1] - held[1000][1]
    print(f"MB by images (process, workers): {held}")
    assert grown[0] < 50 and grown[1] < 50, f"MB by images (process, workers): {held}"
