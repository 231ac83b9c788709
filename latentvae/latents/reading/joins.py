"""What joins the latents by key when they are read: captions and labels, arrays of the user's, filters on the index."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from latentvae.data.captions import Captions, open_captions
from latentvae.errors import UserError, one_line
from latentvae.latents.store.records import Manifest

Filter: TypeAlias = Any  # pc.Expression, or a function of the index (pyarrow.Table) that gives a mask
CaptionsLike = bool | str | Path | Mapping[str, Any] | Captions
ArraysLike = Mapping[str, Mapping[str, Any] | tuple[Sequence[str], Any]]

PROBED = 256  # images of which at least one must have a caption where captions are asked for


def filtered(table: pa.Table, wanted: Filter | None, store: str) -> pa.Table:
    """The rows of an index that are wanted.

    wanted: an Arrow expression (`pc.field("width") > 512`), or a function of the table that gives a mask (n,) of bools.
    UserError where it does not fit the columns.
    """
    if wanted is None:
        return table
    try:
        if isinstance(wanted, pc.Expression):
            return table.filter(wanted)
        mask = wanted(table)
    except (pa.ArrowException, KeyError) as error:
        names = ", ".join(table.column_names)
        raise UserError(
            f"the filter does not fit the index of {store} ({one_line(error)}); columns: {names}"
        ) from error
    if not isinstance(mask, pa.Array | pa.ChunkedArray):
        mask = np.asarray(mask)
        if mask.dtype != bool or mask.shape != (len(table),):
            raise UserError(f"the filter gave {mask.dtype} {mask.shape}: a mask of {len(table)} bools is needed")
        mask = pa.array(mask)
    return table.filter(mask)


class Joins:
    """Captions, labels and arrays of items, by key. Picklable where the captions and arrays are.

    Args:
        captions: True (of the source that the manifest names), whatever `open_captions` takes, or a `Captions`.
        fields: names of the captions' other fields that every item is to have, such as "label".
        arrays: name -> mapping from key to value, or (keys, values in the same order).
        manifest: names the source of the store's images, for captions=True.
        taken: names of the item's own fields.
    """

    def __init__(
        self,
        captions: CaptionsLike | None,
        fields: Sequence[str],
        arrays: ArraysLike | None,
        manifest: Manifest,
        taken: Sequence[str],
    ) -> None:
        if fields and not captions:
            raise UserError(f"fields are {', '.join(fields)}: they come with captions, so pass captions too")
        self.fields = tuple(fields)
        self.captions = opened_captions(captions, manifest)
        self.arrays = {name: _by_key(name, values) for name, values in (arrays or {}).items()}
        self._where = manifest.source if captions is True else type(self.captions).__name__
        names = [*taken, *(["caption"] if self.captions is not None else []), *self.fields, *self.arrays]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"items would have two fields named {', '.join(twice)}: give the arrays other names")

    @property
    def names(self) -> list[str]:
        """Fields that `get` adds to an item."""
        return [*(["caption"] if self.captions is not None else []), *self.fields, *self.arrays]

    def check_arrays(self, keys: Sequence[str]) -> None:
        """UserError where an array lacks one of these keys."""
        for name, values in self.arrays.items():
            missing = [key for key in keys if key not in values]
            if missing:
                raise UserError(
                    f"array {name!r} lacks {len(missing)} of {len(keys)} keys, the first {missing[0]!r}: "
                    "give a value for every key, or leave images out with filter="
                )

    def check_captions(self, keys: Sequence[str]) -> None:
        """UserError where none of the first images has a caption: they are then somewhere else."""
        if self.captions is not None and not self.fields and len(keys):
            probed = self.captions.get(keys[:PROBED])
            if not any("caption" in fields for fields in probed):
                raise UserError(f"none of the first {len(probed)} images has a caption in {self._where}")

    def get(self, keys: Sequence[str]) -> list[dict[str, Any]]:
        """The joined fields of each image; the caption of an image that has none is ""."""
        joined: list[dict[str, Any]] = [{} for _ in keys]
        if self.captions is not None:
            for item, key, found in zip(joined, keys, self.captions.get(keys), strict=True):
                item["caption"] = found.get("caption", "")
                for name in self.fields:
                    if name not in found:
                        has = ", ".join(found) or "none"
                        raise UserError(f"{key!r} has no field {name!r} in {self._where} (it has: {has})")
                    item[name] = found[name]
        for name, values in self.arrays.items():
            for item, key in zip(joined, keys, strict=True):
                item[name] = _as_tensor(values[key])
        return joined


class _Aligned(Mapping[str, Any]):
    """(keys, values) as a mapping; the values stay where they are, which may be a memory map."""

    def __init__(self, name: str, keys: Sequence[str], values: Any) -> None:
        if len(keys) != len(values):
            raise UserError(f"array {name!r} has {len(keys)} keys and {len(values)} values: give one for each")
        self._places = {str(key): place for place, key in enumerate(keys)}
        self._values = values
        if len(self._places) != len(keys):
            raise UserError(f"array {name!r} has {len(keys) - len(self._places)} keys twice: give each once")

    def __getitem__(self, key: str) -> Any:
        return self._values[self._places[key]]

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _by_key(name: str, values: Mapping[str, Any] | tuple[Sequence[str], Any]) -> Mapping[str, Any]:
    if isinstance(values, Mapping):
        return values
    if not isinstance(values, tuple) or len(values) != 2:
        raise UserError(f"array {name!r} is a {type(values).__name__}: a mapping or (keys, values) is needed")
    return _Aligned(name, *values)


def opened_captions(captions: CaptionsLike | None, manifest: Manifest) -> Captions | None:
    """What a reader was given as captions; True: those of the source that the store was made from."""
    if captions is None or captions is False:
        return None
    if captions is True:
        try:
            return open_captions(manifest.source, **manifest.source_options)
        except UserError as error:
            raise UserError(f"captions=True: {error}; pass the source or the captions themselves") from error
    if isinstance(captions, str | Path | Mapping):
        return open_captions(captions)
    return captions if hasattr(captions, "get") else open_captions(captions)


def _as_tensor(value: Any) -> Any:
    """Arrays as tensors of their own memory (a view would drag the whole array along); all else as it is."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.array(value))
    return value.clone() if isinstance(value, Tensor) else value
