"""Training batches, taken and compared."""

from itertools import islice

from latentvae.data.pipeline import Batch, DataConfig, training_batches
from latentvae.images import PixelFormat

RGB = PixelFormat()
SMALL = DataConfig(resolution=32, num_workers=0)


def steps(
    source, config=SMALL, pixels=RGB, *, count=3, seed=1, start=0, batch=8, micro=4, rank=0, ranks=1, indices=None
):
    batches = training_batches(
        source,
        config,
        pixels,
        seed=seed,
        start_image=start,
        global_batch_size=batch,
        micro_batch_size=micro,
        process_index=rank,
        num_processes=ranks,
        indices=indices,
    )
    return list(islice(batches, count))


def flat(batches: list[list[Batch]]) -> dict[int, tuple[str, bytes]]:
    """position -> (key, the shape and the bytes of the image)."""
    return {
        position: (key, repr(tuple(image.shape)).encode() + image.numpy().tobytes())
        for step in batches
        for batch in step
        for position, key, image in zip(batch.positions, batch.keys, batch.images, strict=True)
    }
