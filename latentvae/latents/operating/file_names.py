"""Keys of images as file names of any system."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

MAX_NAME_BYTES = 200  # file systems take 255


def safe_path(key: str) -> str:
    """A relative path that leads out of no folder: keys are the user's, and may hold "..", a drive, any character."""
    parts = [part for part in PurePosixPath(key).parts if part not in ("/", "..", ".")]
    return "/".join(map(safe_part, parts)) or "_"


def safe_part(part: str) -> str:
    """One part of a key as a file name of any system: at most 200 bytes, which leaves room for a temporary name."""
    name = re.sub(r'[\x00-\x1f<>:"|?*\\]', "_", part)
    data = name.encode("utf-8", "surrogateescape")
    if len(data) <= MAX_NAME_BYTES:
        return name
    digest = hashlib.sha256(data).hexdigest()[:16]
    return f"{data[: MAX_NAME_BYTES - 17].decode('utf-8', 'ignore')}-{digest}"


def are_apart(names: Sequence[str]) -> bool:
    """Whether files of these names can lie in one folder: case may not count, and no file is where a folder is."""
    lower = {name.lower() for name in names}
    folders = {str(parent) for name in lower for parent in PurePosixPath(name).parents}
    return len(lower) == len(names) and not lower & folders
