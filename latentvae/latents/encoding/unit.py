"""The latents of one unit while they come in: batches per bucket, then tensors and index rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentvae.latents.encoding.encoder import EncodedBatch
from latentvae.latents.encoding.preprocess import Piece
from latentvae.latents.store.records import IndexRow


@dataclass(frozen=True)
class WaitingBatch:
    """Images of one bucket that are encoded together."""

    unit: "UnitLatents"
    bucket: str
    positions: list[int]  # inputs of the unit
    images: list[Tensor]  # (H, W, C) each

    @property
    def keys(self) -> list[str]:
        """Of the images."""
        return [self.unit.rows[position].key for position in self.positions]

    def pixels(self) -> Tensor:
        """(B, H, W, C)."""
        return torch.stack(self.images)


class UnitLatents:
    """Collects the inputs of one unit into full batches, and their latents into tensors.

    A batch holds readable images of one bucket in the unit's order, whatever pieces they come in: what a unit's files
    hold depends on the unit alone.
    """

    def __init__(self, num_inputs: int, batch_size: Callable[[str], int]) -> None:
        """`batch_size`: of a bucket, by its name."""
        self.num_inputs, self._batch_size = num_inputs, batch_size
        self.rows: list[IndexRow] = []
        self._waiting: dict[str, tuple[list[int], list[Tensor]]] = {}  # bucket -> positions, images
        self._parts: dict[str, list[dict[str, Tensor]]] = {}  # bucket -> tensors of its batches
        self._stored: dict[str, int] = {}  # bucket -> rows so far

    @property
    def is_read(self) -> bool:
        """All inputs were added."""
        return len(self.rows) == self.num_inputs

    def add(self, piece: Piece) -> list[WaitingBatch]:
        """The next inputs of the unit => the batches that are full now."""
        images = iter(piece.images())
        full = []
        for row in piece.rows:
            if row.status == "ok":
                assert row.bucket is not None
                positions, waiting = self._waiting.setdefault(row.bucket, ([], []))
                positions.append(len(self.rows))
                waiting.append(next(images))
                if len(waiting) >= self._batch_size(row.bucket):
                    full.append(self._batch(row.bucket))
            self.rows.append(row)
        return full

    def rest(self) -> list[WaitingBatch]:
        """The batches that are not full, when all inputs were added."""
        return [self._batch(bucket) for bucket in list(self._waiting)]

    def _batch(self, bucket: str) -> WaitingBatch:
        return WaitingBatch(self, bucket, *self._waiting.pop(bucket))

    def take(self, batch: WaitingBatch, encoded: EncodedBatch) -> None:
        """What became of a batch; batches of one bucket come in their order."""
        for index, position in enumerate(batch.positions):
            row = replace(self.rows[position], notes=encoded.notes.get(index))
            if index in encoded.problems:
                row = replace(row, status="error", error=encoded.problems[index], bucket=None)
            else:
                place = self._stored.get(batch.bucket, 0)
                row = replace(row, row=place)
                self._stored[batch.bucket] = place + 1
            self.rows[position] = row
        if len(encoded.problems) < len(batch.positions):
            self._parts.setdefault(batch.bucket, []).append(dict(encoded.tensors))

    def result(self) -> tuple[dict[str, dict[str, Tensor]], Sequence[IndexRow]]:
        """Bucket -> tensors (N, D, h, w) of the rows that are ok, and one row per input.

        To be asked once: what is joined is forgotten, for a unit may hold a GB.
        """
        tensors: dict[str, dict[str, Tensor]] = {}
        for bucket in sorted(self._parts):
            parts = self._parts.pop(bucket)
            tensors[bucket] = {name: torch.cat([part.pop(name) for part in parts]) for name in list(parts[0])}
        return tensors, self.rows
