"""Every image file below a folder, at any depth."""

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from latentvae.data.entries import EntryTable, ListedSource, SourceEntry
from latentvae.data.storage import read_file
from latentvae.errors import UserError
from latentvae.images import IMAGE_EXTENSIONS, DecodePolicy, PixelFormat


def image_extensions(pixels: PixelFormat) -> frozenset[str]:
    """Lower-case extensions that mark an image of this format."""
    # .npy holds what no picture file can; beside photographs it is more likely something else
    is_rgb = pixels.channels == 3 and pixels.dtype != "float32"
    return IMAGE_EXTENSIONS if is_rgb else IMAGE_EXTENSIONS | {".npy"}


def walk(folder: str | Path) -> Iterator[tuple[str, os.DirEntry[str], os.stat_result]]:
    """(path inside the folder, entry, status) of every regular file; hidden ones are left out, links are followed.

    Raises UserError where a folder or file cannot be looked at.
    """
    return _walk(str(folder), "", frozenset())


def _walk(
    folder: str, prefix: str, above: frozenset[tuple[int, int]]
) -> Iterator[tuple[str, os.DirEntry[str], os.stat_result]]:
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
            yield from _walk(child.path, f"{prefix}{child.name}/", above | {identity})
        elif stat.S_ISREG(status.st_mode):
            yield prefix + child.name, child, status


class FolderSource(ListedSource):
    """Every image file below a folder, at any depth, by key; hidden files and folders are left out, links followed."""

    is_sequential = False

    def __init__(
        self, folder: str | Path, pixels: PixelFormat | None = None, policy: DecodePolicy | None = None
    ) -> None:
        super().__init__(str(folder), pixels, policy)
        self.folder = Path(folder)
        if not self.folder.exists():
            raise UserError(f"image folder {self.folder} does not exist: give the path of a folder of images")
        if not self.folder.is_dir():
            raise UserError(f"{self.folder} is not a folder: give the path of a folder of images")

    def list_entries(self) -> EntryTable:
        extensions = image_extensions(self.pixels)
        found = (
            SourceEntry(key, file.path, None, status.st_size, status.st_mtime_ns)
            for key, file, status in walk(self.folder)
            if os.path.splitext(file.name)[1].lower() in extensions
        )
        return EntryTable.from_entries(found).sorted_by_key()

    def looked_for(self) -> str:
        return "looked in all its folders for files such as .jpg, .png, .webp or .tif"

    def fetch(self, entries: Sequence[SourceEntry]) -> list[bytes | np.ndarray | Exception]:
        return [read_file(entry.uri) for entry in entries]
