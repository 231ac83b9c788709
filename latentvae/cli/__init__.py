"""The command line. torch and diffusers are imported inside the commands, so that `--help` answers at once."""

from latentvae.cli import encode, export, models, stores
from latentvae.cli.app import app, main

__all__ = [
    "app",
    "encode",
    "export",
    "main",
    "models",
    "stores",
]  # these modules register their commands when they are imported
