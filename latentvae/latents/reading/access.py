"""The files of a store that is only read, wherever they lie; remote.py has those behind URLs."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from latentvae.errors import UserError
from latentvae.latents.store.files import LatentStore
from latentvae.latents.store.records import FileRecord

T = TypeVar("T")


class StoreFiles(Protocol):
    """Picklable; safe to use from several processes at once."""

    name: str  # folder or URL, for messages

    def small_files(self) -> AbstractContextManager[LatentStore]:
        """A store of which the manifest, the plan and the commit records can be read, as they are now."""

    def use(self, name: str, expected: FileRecord, reader: Callable[[Path], T]) -> T:
        """What `reader` makes of an index or a shard, given where it lies on the local disk.

        UserError where it is gone: the store changed after its commit record was read.
        """


class LocalFiles:
    """The files of a store in a folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.name = str(folder)

    @contextmanager
    def small_files(self) -> Iterator[LatentStore]:
        """The store itself."""
        yield LatentStore(self.folder)

    def use(self, name: str, expected: FileRecord, reader: Callable[[Path], T]) -> T:
        """`expected` is not compared here: that is what `latentvae verify` is for."""
        path = self.folder / name
        if not path.exists():
            raise store_changed(self.name, name)
        return reader(path)


def store_changed(store: str, name: str) -> UserError:
    """What to raise for a file that was there when the store was opened."""
    return UserError(f"{store} lacks {name}: the store changed since it was opened: open it again")
