"""Where images come from: a folder, or any Python object that yields them; listed in key order, read one at a time."""

import importlib
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from latentvae.errors import UserError, one_line
from latentvae.images import IMAGE_EXTENSIONS, DecodePolicy, ImageError, PixelFormat, conform, decode, from_pillow

# kinds of source that are recognised only to be refused by name
_ARCHIVES = {
    ".tar": "a tar file",
    ".tgz": "a tar file",
    ".zip": "a zip file",
    ".parquet": "a Parquet file",
    ".arrow": "an Arrow file",
}


@dataclass(frozen=True)
class SourceEntry:
    """One image of a source, before it is read."""

    key: str  # its identity: the path inside the source with extension, "/" between folders
    uri: str  # where it is, for people and records
    num_bytes: int | None  # size of the file; None where there is none
    mtime_ns: int | None  # time of its last change, ns since 1970; None where there is none


class ImageSource(Protocol):
    """What training and encoding read from. Picklable, so that worker processes can be spawned with it."""

    name: str  # for logs

    def __len__(self) -> int: ...

    def entries(self) -> Sequence[SourceEntry]:
        """Every image, sorted by key; the same list at every call."""
        ...

    def read(self, index: int) -> np.ndarray:
        """Image `index` of `entries()` => (H, W, C) of the source's pixel format, or ImageError."""
        ...


class FolderSource:
    """Every image file below a folder, at any depth; hidden files and folders are left out, links are followed."""

    def __init__(
        self, folder: str | Path, pixels: PixelFormat | None = None, policy: DecodePolicy | None = None
    ) -> None:
        self.folder = Path(folder)
        self.name = str(folder)
        self._pixels = pixels or PixelFormat()
        self._policy = policy or DecodePolicy()
        # .npy holds what no picture file can; beside photographs it is more likely something else
        is_rgb = self._pixels.channels == 3 and self._pixels.dtype != "float32"
        self._extensions = IMAGE_EXTENSIONS if is_rgb else IMAGE_EXTENSIONS | {".npy"}
        if not self.folder.exists():
            raise UserError(f"image folder {self.folder} does not exist: give the path of a folder of images")
        if not self.folder.is_dir():
            raise UserError(f"{self.folder} is not a folder: give the path of a folder of images")
        found: list[SourceEntry] = []
        self._scan(self.folder, "", frozenset(), found)
        self._entries = sorted(found, key=lambda entry: entry.key)
        if not self._entries:
            raise UserError(
                f"no images in {self.folder}: looked in all its folders for files such as .jpg, .png, .webp or .tif"
            )

    def _scan(self, folder: Path, prefix: str, above: frozenset[tuple[int, int]], found: list[SourceEntry]) -> None:
        try:
            here = os.stat(folder)
            # device and inode; Windows may give 0 for both, and has no such loops in practice
            identity = (here.st_dev, here.st_ino)
            if here.st_ino and identity in above:
                return  # a link that leads back into the folders above it
            children = sorted(os.scandir(folder), key=lambda child: child.name)
        except OSError as error:
            raise UserError(
                f"cannot list {folder}: {error.strerror or error}; mend its permissions or move it away"
            ) from error
        for child in children:
            if child.name.startswith("."):
                continue
            try:
                status = child.stat()
            except FileNotFoundError:
                continue  # a link to nothing, or removed since it was listed
            except OSError as error:
                if child.is_symlink():
                    continue  # a link to itself is no image
                raise UserError(
                    f"cannot look at {child.path}: {error.strerror or error}; mend its permissions or move it away"
                ) from error
            if stat.S_ISDIR(status.st_mode):
                self._scan(Path(child.path), f"{prefix}{child.name}/", above | {identity}, found)
            elif stat.S_ISREG(status.st_mode) and os.path.splitext(child.name)[1].lower() in self._extensions:
                key = prefix + child.name
                found.append(SourceEntry(key, child.path, status.st_size, status.st_mtime_ns))

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self) -> Sequence[SourceEntry]:
        return self._entries

    def read(self, index: int) -> np.ndarray:
        return decode(self._entries[index].uri, self._pixels, self._policy)


class PythonSource:
    """Items {"key": str, "image": (H, W, C) array | PIL image | path | bytes} from Python; other fields are ignored.

    With `__len__` and `__getitem__` it is read lazily; every item is fetched once at the start for its key, unless the
    object has a method `keys()` that lists them in item order. Any other iterable, or a function that returns one, is
    read into memory once. Arrays must be of the declared pixel format. An exception raised for one item makes that
    image unreadable, and is named.
    """

    def __init__(
        self, items: Any, pixels: PixelFormat | None = None, policy: DecodePolicy | None = None, name: str | None = None
    ) -> None:
        self.name = name or f"python object {type(items).__name__}"
        self._pixels = pixels or PixelFormat()
        self._policy = policy or DecodePolicy()
        if callable(items) and not hasattr(items, "__getitem__"):
            items = items()
        if isinstance(items, Mapping) or not (isinstance(items, Iterable) or hasattr(items, "__getitem__")):
            raise UserError(
                f"{self.name} gave a {type(items).__name__}: a sequence or iterable of {{'key', 'image'}} is needed"
            )
        self._items = items if hasattr(items, "__len__") and hasattr(items, "__getitem__") else list(items)
        keys = self._list_keys()
        self._order = sorted(range(len(keys)), key=keys.__getitem__)
        self._entries = [SourceEntry(keys[index], f"{self.name}#{keys[index]}", None, None) for index in self._order]
        if not self._entries:
            raise UserError(f"{self.name} has no images: it must yield at least one {{'key', 'image'}}")
        for one, other in zip(self._entries, self._entries[1:], strict=False):
            if one.key == other.key:
                raise UserError(f"{self.name} has the key {one.key!r} twice: every image needs a key of its own")

    def _list_keys(self) -> list[str]:
        list_keys = getattr(self._items, "keys", None)
        if callable(list_keys):
            keys = list(list_keys())
            if len(keys) != len(self._items):
                raise UserError(
                    f"{self.name} lists {len(keys)} keys for {len(self._items)} items: there must be one for each"
                )
        else:
            keys = [self._field(self._items[index], "key", index) for index in range(len(self._items))]
        for index, key in enumerate(keys):
            if not isinstance(key, str) or not key:
                raise UserError(f"{self.name}: the key of item {index} is {key!r}; it must be a non-empty string")
        return keys

    def _field(self, item: Any, field: str, index: int) -> Any:
        if not isinstance(item, Mapping) or field not in item:
            given = f"the fields {sorted(map(str, item))}" if isinstance(item, Mapping) else f"a {type(item).__name__}"
            raise UserError(f"{self.name}: item {index} is {given}; a dict with 'key' and 'image' is needed")
        return item[field]

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self) -> Sequence[SourceEntry]:
        return self._entries

    def read(self, index: int) -> np.ndarray:
        position = self._order[index]
        try:
            item = self._items[position]
        except Exception as error:
            raise ImageError(f"the source raised {type(error).__name__}: {one_line(error)[:200]}") from error
        key = self._field(item, "key", position)
        if key != self._entries[index].key:
            raise UserError(
                f"{self.name}: item {position} had the key {self._entries[index].key!r} and now {key!r}; "
                "a key must stay"
            )
        image = self._field(item, "image", position)
        if isinstance(image, np.ndarray):
            return self._declared(image)
        if isinstance(image, Image.Image):
            return from_pillow(image, self._pixels, self._policy)
        if isinstance(image, str | Path | bytes):
            return decode(image, self._pixels, self._policy)
        raise ImageError(f"is a {type(image).__name__}; an array, a PIL image, a path or bytes is needed")

    def _declared(self, array: np.ndarray) -> np.ndarray:
        if array.dtype != self._pixels.numpy_dtype:  # an array says what it is: nothing is converted behind its back
            raise ImageError(f"is a {array.dtype} array; {self._pixels.dtype} is declared")
        return conform(array, self._pixels)


def _import(specification: str) -> Callable[..., Any] | Any:
    module_name, _, attribute = specification.removeprefix("python:").partition(":")
    if not module_name or not attribute:
        raise UserError(f"source {specification!r}: write it as python:module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"source {specification!r}: {error}; install the module or put its folder on PYTHONPATH"
        ) from error
    if not hasattr(module, attribute):
        raise UserError(f"source {specification!r}: module {module_name} has no {attribute!r}")
    return getattr(module, attribute)


def open_source(
    source: str | Path | object, pixels: PixelFormat | None = None, policy: DecodePolicy | None = None
) -> ImageSource:
    """A folder's path, "python:module:function", or a Python object (see PythonSource) => a source of `pixels`."""
    if isinstance(source, FolderSource | PythonSource):
        return source
    if isinstance(source, str) and source.startswith("python:"):
        return PythonSource(_import(source), pixels, policy, name=source)
    if not isinstance(source, str | Path):
        return PythonSource(source, pixels, policy)
    if "://" in str(source) or str(source).startswith("hf:"):
        raise UserError(
            f"source {source}: only local folders and python:module:function can be read; download it first"
        )
    kind = _ARCHIVES.get(Path(source).suffix.lower())
    if kind and not Path(source).is_dir():
        raise UserError(
            f"source {source} is {kind}: only folders and python:module:function can be read; unpack it first"
        )
    return FolderSource(Path(source).expanduser(), pixels, policy)
