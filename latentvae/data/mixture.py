"""Several sources as one: keys that say which source, and how often an epoch holds the images of each."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, Field

from latentvae.data.entries import EntryTable, ImageSource, ListedSource, SourceEntry
from latentvae.data.sources import open_source
from latentvae.images import DecodePolicy, ImageError, PixelFormat

_ROWS = 65_536  # whose keys are made at a time


class SourceConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """One of the sources of a mixture."""

    source: str = Field(description="as data.source")
    repeats: float = Field(
        1.0, gt=0, le=100_000, description="how often an epoch holds each image; 2.5: 2 or 3 times, 0.25: every fourth"
    )
    name: str | None = Field(
        None, pattern=r"^[^/\x00]+$", description="what its keys begin with; null: its place in the list, from 0"
    )
    key_column: str | None = Field(None, description="as data.key_column")
    image_column: str | None = Field(None, description="as data.image_column")
    streaming: bool = Field(False, description="as data.streaming")
    split: str | None = Field(None, description="as data.split")

    def open(self, pixels: PixelFormat, policy: DecodePolicy) -> ImageSource:
        """The source, not yet listed. Raises UserError where it cannot be one."""
        return open_source(
            self.source,
            pixels,
            policy,
            key_column=self.key_column,
            image_column=self.image_column,
            streaming=self.streaming,
            split=self.split,
        )


class MixtureSource(ListedSource):
    """All images of several sources, source after source; keys are "<name of the source>/<key in it>"."""

    def __init__(
        self,
        parts: Mapping[str, ImageSource],
        pixels: PixelFormat | None = None,
        policy: DecodePolicy | None = None,
    ) -> None:
        """`parts`: the sources by name, in their order; a name has no "/"."""
        super().__init__(" + ".join(part.name for part in parts.values()), pixels, policy)
        self.parts = dict(parts)
        self.is_sequential = any(part.is_sequential for part in self.parts.values())

    def list_entries(self) -> EntryTable:
        return EntryTable.concatenated(_named(name, part.entries()) for name, part in self.parts.items())

    @property
    def bounds(self) -> np.ndarray:
        """Where the entries of each source begin, and where the last ones end: (sources + 1,) int64."""
        return np.cumsum([0, *(len(part) for part in self.parts.values())])

    def fetch(self, entries: Sequence[SourceEntry]) -> list[bytes | np.ndarray | Exception]:
        contents: list[bytes | np.ndarray | Exception] = []
        for name, run in groupby(entries, key=lambda entry: entry.key.partition("/")[0]):
            own = [replace(entry, key=entry.key.partition("/")[2]) for entry in run]
            part = self.parts.get(name)
            contents += (
                part.fetch(own) if part is not None else [ImageError("is of no source of the mixture")] * len(own)
            )
        return contents


def _named(name: str, entries: EntryTable) -> EntryTable:
    batches = []
    for batch in entries.table.to_batches(max_chunksize=_ROWS):  # so that no array of strings exceeds 2 GiB
        keys = pc.binary_join_element_wise(pa.scalar(f"{name}/"), batch.column(0), "")
        batches.append(pa.RecordBatch.from_arrays([keys, *batch.columns[1:]], schema=batch.schema))
    return EntryTable(pa.Table.from_batches(batches, schema=entries.table.schema))


def source_names(sources: Sequence[SourceConfig]) -> list[str]:
    """What the keys of each begin with. Raises ValueError for a name that two have."""
    names = [str(place) if source.name is None else source.name for place, source in enumerate(sources)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two sources have the name {name!r}: give each another")
    return names


def open_sources(sources: Sequence[SourceConfig], pixels: PixelFormat, policy: DecodePolicy) -> ImageSource:
    """Several sources as one; a single one as it is, with its own keys."""
    opened = [source.open(pixels, policy) for source in sources]
    if len(opened) == 1:
        return opened[0]
    return MixtureSource(dict(zip(source_names(sources), opened, strict=True)), pixels, policy)
