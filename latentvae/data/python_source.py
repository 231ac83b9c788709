"""Images from any Python object that yields them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentvae.data.entries import EntryTable, ListedSource, SourceEntry
from latentvae.data.storage import read_file
from latentvae.errors import UserError, one_line
from latentvae.images import DecodePolicy, ImageError, PixelFormat, from_pillow


class PythonSource(ListedSource):
    """Items {"key": str, "image": (H, W, C) array | PIL image | path | bytes} from Python, in their order.

    With `__len__` and `__getitem__` it is read lazily; every item is fetched once for its key when the source is
    listed, unless the object has a method `keys()` that lists them in item order. Any other iterable, or a function
    that returns one, is read into memory then. Arrays must be of the declared pixel format. Other fields are captions
    and labels (`open_captions`). An exception raised for one item makes that image unreadable, and is named.
    """

    def __init__(
        self, items: Any, pixels: PixelFormat | None = None, policy: DecodePolicy | None = None, name: str | None = None
    ) -> None:
        super().__init__(name or f"python object {type(items).__name__}", pixels, policy)
        self._is_function = callable(items) and not hasattr(items, "__getitem__")
        self._given: Any = items
        self._items: Any = None
        if not self._is_function:
            self._check_kind(items)

    def _check_kind(self, items: Any) -> None:
        if isinstance(items, Mapping) or not (isinstance(items, Iterable) or hasattr(items, "__getitem__")):
            raise UserError(
                f"{self.name} gave a {type(items).__name__}: a sequence or iterable of {{'key', 'image'}} is needed"
            )

    @property
    def items(self) -> Any:
        """The items by position; a function is called and an iterator read at the first use."""
        if self._items is None:
            items = self._given() if self._is_function else self._given
            self._check_kind(items)
            self._items = items if hasattr(items, "__len__") and hasattr(items, "__getitem__") else list(items)
            self._given = None
        return self._items

    def __getstate__(self) -> dict[str, Any]:
        if not self._is_function:
            _ = self.items  # an iterator cannot be sent to another process; what it yields can
        return self.__dict__.copy()

    def list_entries(self) -> EntryTable:
        return EntryTable.from_columns(self._list_keys(), self.name, np.arange(len(self.items)))

    def looked_for(self) -> str:
        return "it must yield at least one {'key', 'image'}"

    def _list_keys(self) -> list[str]:
        list_keys = getattr(self.items, "keys", None)
        if callable(list_keys):
            keys = list(list_keys())
            if len(keys) != len(self.items):
                raise UserError(
                    f"{self.name} lists {len(keys)} keys for {len(self.items)} items: there must be one for each"
                )
        else:
            keys = [self._field(self.items[index], "key", index) for index in range(len(self.items))]
        for index, key in enumerate(keys):
            if not isinstance(key, str) or not key:
                raise UserError(f"{self.name}: the key of item {index} is {key!r}; it must be a non-empty string")
        return keys

    def _field(self, item: Any, field: str, index: int) -> Any:
        if not isinstance(item, Mapping) or field not in item:
            given = f"the fields {sorted(map(str, item))}" if isinstance(item, Mapping) else f"a {type(item).__name__}"
            raise UserError(f"{self.name}: item {index} is {given}; a dict with 'key' and 'image' is needed")
        return item[field]

    def fetch(self, entries: Sequence[SourceEntry]) -> list[bytes | np.ndarray | Exception]:
        """Raises UserError where an item has changed its key."""
        return [self._fetch(entry) for entry in entries]

    def _fetch(self, entry: SourceEntry) -> bytes | np.ndarray | Exception:
        if entry.offset is None or entry.offset >= len(self.items):
            return ImageError("is no longer in the source")
        try:
            item = self.items[entry.offset]
        except Exception as error:
            return ImageError(f"the source raised {type(error).__name__}: {one_line(error)[:200]}")
        key = self._field(item, "key", entry.offset)
        if key != entry.key:
            raise UserError(
                f"{self.name}: item {entry.offset} had the key {entry.key!r} and now {key!r}; a key must stay"
            )
        image = self._field(item, "image", entry.offset)
        if isinstance(image, np.ndarray | bytes):
            return image
        if isinstance(image, str | Path):
            return read_file(str(image))
        if isinstance(image, Image.Image):
            try:
                return from_pillow(image, self.pixels, self.policy)
            except ImageError as error:
                return error
        return ImageError(f"is a {type(image).__name__}; an array, a PIL image, a path or bytes is needed")
