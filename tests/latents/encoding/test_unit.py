"""A unit's rows and tensors depend on its inputs alone, in whatever pieces they come."""

import weakref

import numpy as np
import pytest
import torch

from latentvae.latents.encoding.encoder import EncodedBatch
from latentvae.latents.encoding.preprocess import Piece, Prepared
from latentvae.latents.encoding.unit import UnitLatents
from latentvae.latents.store.records import IndexRow

BUCKETS = ["8x8", "8x16", None, "8x8", "8x8", "8x16", "8x8"]  # of the inputs; None: not readable


def inputs():
    """Each image is full of its number."""
    found = []
    for number, bucket in enumerate(BUCKETS):
        status = "error" if bucket is None else "ok"
        row = IndexRow(key=f"{number}", row=-1, status=status, bucket=bucket)
        image = None
        if bucket is not None:
            width, height = map(int, bucket.split("x"))
            image = np.full((height, width, 3), number, np.uint8)
        found.append(Prepared(row, image))
    return found


def encoded(batch, broken):
    """The mean of an image, as a latent of one number; one of the images cannot be encoded."""
    bad = [place for place, key in enumerate(batch.keys) if key == broken]
    means = torch.tensor([[[[image.float().mean()]]] for image in batch.images])
    keep = [place for place in range(len(batch.keys)) if place not in bad]
    return EncodedBatch({"mean": means[keep]}, dict.fromkeys(bad, "not finite"), {})


@pytest.mark.parametrize("piece", [1, 3, 7])
def test_rows_and_tensors_are_the_same_in_any_pieces(piece):
    unit, batches = UnitLatents(len(BUCKETS), lambda bucket: 2), []
    for start in range(0, len(BUCKETS), piece):
        batches += unit.add(Piece.of(inputs()[start : start + piece]))
    assert unit.is_read
    batches += unit.rest()
    assert sorted(batch.keys for batch in batches) == [["0", "3"], ["1", "5"], ["4", "6"]]
    for batch in batches:
        unit.take(batch, encoded(batch, "3"))
    tensors, rows = unit.result()
    assert {bucket: values["mean"].flatten().tolist() for bucket, values in tensors.items()} == {
        "8x16": [1, 5],
        "8x8": [0, 4, 6],
    }
    assert [(row.key, row.bucket, row.row, row.status) for row in rows] == [
        ("0", "8x8", 0, "ok"),
        ("1", "8x16", 0, "ok"),
        ("2", None, -1, "error"),
        ("3", None, -1, "error"),
        ("4", "8x8", 1, "ok"),
        ("5", "8x16", 1, "ok"),
        ("6", "8x8", 2, "ok"),
    ]


def test_what_is_joined_is_not_held_twice():
    unit = UnitLatents(len(BUCKETS), lambda bucket: 1)
    parts = []
    for batch in unit.add(Piece.of(inputs())):
        result = encoded(batch, None)
        parts.append(weakref.ref(result.tensors["mean"]))
        unit.take(batch, result)
        del result
    assert len(parts) == 6 and all(part() is not None for part in parts)
    tensors, _ = unit.result()
    assert len(tensors["8x8"]["mean"]) == 4
    assert all(part() is None for part in parts)
