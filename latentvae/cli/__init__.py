"""The command line. torch and diffusers are imported inside the commands, so that `--help` answers at once."""

from latentvae.cli import models, stores
from latentvae.cli.app import app, main

__all__ = ["app", "main", "models", "stores"]  # the two modules register their commands when they are imported
