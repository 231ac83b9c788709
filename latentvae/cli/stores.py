"""Commands about latent stores that are there: decode, verify, stats, gc."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from latentvae.cli.app import app, given
from latentvae.errors import UserError

StoreArgument = Annotated[Path, typer.Argument(help="folder of a latent store")]
ReadArgument = Annotated[str, typer.Argument(help="folder or URL of a latent store")]
DeviceOption = Annotated[str | None, typer.Option(help="such as cuda:1  [default: a GPU where there is one]")]


@app.command()
def decode(
    store: ReadArgument,
    out: Annotated[Path, typer.Option(help="folder for the pictures")],
    vae: Annotated[
        str | None, typer.Option(help="diffusers folder, hub id or file  [default: the one that encoded]")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="decode the first N only")] = None,
    batch_size: Annotated[int | None, typer.Option(help="images per forward  [default: 16]")] = None,
    device: DeviceOption = None,
) -> None:
    """Turn the latents of a store into pictures."""
    from latentvae.latents.operating.decode import decode_store

    _one_process("decode")
    print(decode_store(store, out, **given(vae=vae, limit=limit, batch_size=batch_size, device=device)))


@app.command()
def verify(
    store: StoreArgument,
    full: Annotated[bool, typer.Option("--full", help="hash every file: finds any flipped byte")] = False,
    deep: Annotated[int, typer.Option(metavar="N", help="encode N rows again and compare")] = 0,
    vae: Annotated[str | None, typer.Option(help="for --deep  [default: the one that encoded]")] = None,
    source: Annotated[str | None, typer.Option(help="for --deep: where the images are now")] = None,
    device: DeviceOption = None,
    drop_damaged: Annotated[
        bool, typer.Option("--drop-damaged", help="remove the records of damaged units: the next encode redoes them")
    ] = False,
) -> None:
    """Check that a latent store is whole.

    Plan, records, indexes, sizes and headers are read, not the latents themselves, unless --full or --deep. Exits 1
    where something is wrong.
    """
    from latentvae.latents.operating.verify import verify_store

    _one_process("verify")
    if not deep and (vae, source) != (None, None):
        raise UserError("--vae and --source are for --deep N")
    report = verify_store(
        store,
        level="full" if full else "quick",
        deep=deep,
        drop_damaged=drop_damaged,
        **given(vae=vae, source=source, device=device),
    )
    print(report)
    if not report.is_whole:
        raise typer.Exit(1)


@app.command()
def stats(
    store: ReadArgument,
    write_config: Annotated[
        Path | None, typer.Option(metavar="DIR", help="write the scaling into the config.json of this diffusers folder")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace values that are there already")] = False,
    per_channel: Annotated[
        bool, typer.Option("--per-channel", help="write latents_mean and latents_std, and scaling_factor 1")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Tell mean and deviation of the latents, counts and sizes, from the commit records alone."""
    from rich.console import Console

    from latentvae.latents.operating.measured import write_measured
    from latentvae.latents.operating.statistics import store_statistics

    _one_process("stats")
    if write_config is None and (force or per_channel):
        raise UserError("--force and --per-channel are for --write-config DIR")
    statistics = store_statistics(store)
    if as_json:
        print(json.dumps(statistics.to_dict(), indent=2))
    else:
        Console(width=None if os.isatty(1) else 200).print(statistics.table(), highlight=False, soft_wrap=True)
    if write_config is not None:
        changed = write_measured(statistics, write_config, per_channel=per_channel, force=force)
        told = ", ".join(f"{name} {value}" for name, value in changed.items()) or "nothing, the values are there"
        typer.echo(f"written to {write_config}: {told}", err=as_json)
        if changed:
            advice = "run the same encode again and the store takes them over (no image is encoded again)"
            typer.echo(f"{store} still normalizes with the old values: {advice}", err=as_json)


@app.command()
def gc(
    store: StoreArgument,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list what would be removed, and stop")] = False,
) -> None:
    """Remove what edits, retries and killed processes left in a latent store.

    Nothing that a commit record names is touched, nor what a running encode works on.
    """
    from latentvae.latents.operating.collect import collect_garbage

    _one_process("gc")
    print(collect_garbage(store, dry_run=dry_run))


def _one_process(command: str) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise UserError(f"latentvae {command} runs in one process, and {processes} were started: start one")
