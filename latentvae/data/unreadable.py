"""Images that could not be used: counted once each, named, and tolerated up to a limit."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from latentvae.errors import UserError
from latentvae.files import write_text

_NAMED = 3  # how many an error message names


class UnreadableImages:
    """The distinct unreadable images met so far, each with the first reason given for it."""

    def __init__(self, limit: int) -> None:
        """`limit`: how many are tolerated; one more raises a UserError."""
        self.limit = limit
        self._reasons: dict[str, str] = {}

    @property
    def count(self) -> int:
        return len(self._reasons)

    def items(self) -> list[tuple[str, str]]:
        """(key, reason) in the order met."""
        return list(self._reasons.items())

    def add(self, pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """Take (key, reason) pairs; returns those not known before. UserError when there are more than the limit."""
        new = []
        for key, reason in pairs:
            if key not in self._reasons:
                self._reasons[key] = reason
                new.append((key, reason))
        if self.count > self.limit:
            raise UserError(
                f"{self.count} unreadable images, more than data.max_unreadable = {self.limit}: {self.describe()}; "
                "mend or remove them, or raise the limit"
            )
        return new

    def describe(self) -> str:
        """The first few, in one line."""
        named = "; ".join(f"{key} {reason}" for key, reason in self.items()[:_NAMED])
        return named + (f"; and {self.count - _NAMED} more" if self.count > _NAMED else "")

    def write_csv(self, path: str | Path) -> None:
        """All of them as a table with the columns key and reason, written atomically."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["key", "reason"])
        writer.writerows(self.items())
        # a file name need not be valid UTF-8
        write_text(path, text.getvalue().encode("utf-8", "backslashreplace").decode())
