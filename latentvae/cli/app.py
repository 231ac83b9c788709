"""The application that the commands belong to, the options they share, and how an error is told."""

import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, TextIO

import typer

from latentvae import __version__
from latentvae.errors import UserError, one_line

app = typer.Typer(
    name="latentvae",
    help="Train image VAEs for latent diffusion, and turn image datasets into latents.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a bug shows Python's own traceback
    rich_markup_mode=None,
)

VaeOption = Annotated[str, typer.Option("--vae", help="diffusers folder, hub id, or single .safetensors file")]
SubfolderOption = Annotated[str | None, typer.Option(help="folder of the VAE inside a hub repository or folder")]
RevisionOption = Annotated[str | None, typer.Option(help="branch, tag or commit on the hub")]
VariantOption = Annotated[str | None, typer.Option(help="variant of the weight files, such as fp16")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. A user's mistake prints one line and exits 2; anything else keeps its traceback and exits 1."""
    logger = logging.getLogger("latentvae")
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if is_main_process() else logging.WARNING)
    try:
        app(args=None if arguments is None else list(arguments))
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    finally:
        logger.removeHandler(handler)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to whatever stderr is now: while a progress bar is shown, lines go through it and stay whole."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _version(value: bool) -> None:
    if value:
        print(f"latentvae {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print it and stop")
    ] = False,
) -> None:
    pass


def given(**options: Any) -> dict[str, Any]:
    """The options that were passed; the others keep the default of the function that owns them."""
    return {name: value for name, value in options.items() if value is not None}


def is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"
