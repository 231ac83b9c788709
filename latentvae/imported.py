"""Objects of the user's own, named by `python:module:name`."""

import importlib
from typing import Any

from latentvae.errors import UserError, one_line


def import_object(specification: str, *, field: str, what: str) -> Any:
    """What "python:module:name" stands for.

    Args:
        field, what: where it was given, and what it should name, for messages.

    Raises:
        UserError: it is written otherwise, or there is no such module or name.
    """
    module_name, _, attribute = specification.removeprefix("python:").partition(":")
    if not specification.startswith("python:") or not module_name or not attribute:
        raise UserError(f"{field} {specification!r}: write it as python:module:{what}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{field} {specification!r}: {one_line(error)}; install the module or put its folder on PYTHONPATH"
        ) from error
    if not hasattr(module, attribute):
        raise UserError(f"{field} {specification!r}: module {module_name} has no {attribute!r}")
    return getattr(module, attribute)
