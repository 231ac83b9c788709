"""How a run ended."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TrainResult:
    """How a call of `Trainer.train` ended.

    Attributes:
        images_seen: over the whole run.
        reason: finished (total_images), max_minutes, or the name of the signal that stopped it.
        model_folder: the finished model; None where a signal stopped the run before its end.
        checkpoint: the newest checkpoint.
        metrics: of the last validation.
    """

    images_seen: int
    reason: str
    model_folder: Path | None
    checkpoint: Path
    metrics: dict[str, float]
