"""What decides the bytes of a latent store, as named fields and as one hash."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from latentvae.config import flatten
from latentvae.errors import UserError
from latentvae.files import canonical_json

LABELS = {"encoder": "the encoder (weights or architecture)", "buckets": "resolution", "store": "store kind"}
SHOWN = 24  # characters of a value in an error: enough to tell two hashes apart


def plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same fields as JSON gives them back (tuples become lists), so that old and new compare equal."""
    result: dict[str, Any] = json.loads(canonical_json(fields))
    return result


def fingerprint(fields: Mapping[str, Any]) -> str:
    """Hex sha256 of the canonical JSON of the fields."""
    return hashlib.sha256(canonical_json(fields)).hexdigest()


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(_shown(item) for item in value)
    text = str(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """One phrase per field that differs, the dotted field named first; empty where the two are equal."""
    old, new = flatten(plain(there)), flatten(plain(here))
    phrases = []
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name) or (name in old) != (name in new):
            before, after = _shown(old.get(name, "absent")), _shown(new.get(name, "absent"))
            phrases.append(f"{LABELS.get(name, name)} is {before} there and {after} here")
    return phrases


def require_same(there: Mapping[str, Any], here: Mapping[str, Any], what: str, advice: str) -> None:
    """Raise a one-line UserError that names every field in which `what` differs from what is wanted here."""
    phrases = differences(there, here)
    if phrases:
        raise UserError(f"{what} was made with other settings: {'; '.join(phrases)}; {advice}")
