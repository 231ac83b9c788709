"""A run or a checkpoint told in a screenful, from its files alone: nothing here imports torch."""

import json
import socket
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from latentvae.errors import UserError, one_line
from latentvae.training.monitor import CollapseMonitor
from latentvae.training.run_dir import STATE_FILE, RunDirectory, damage, is_alive, saved_metrics
from latentvae.training.wording import changes_planned, duration, main_figures, progress_line, short_images, size

SILENT_SECONDS = 3600  # on another machine, after which a run that says it is running is doubted
VALIDATION = "validation_"
_START = ("start_from", "subfolder", "revision", "variant")
NAMES = {
    "psnr": "PSNR {:.2f} dB",
    "lpips": "LPIPS {:.4f}",
    "equivariance_error": "equivariance error {:.4f}",
    "active_channels": "{:.0f} active channels",
}
FILES = (  # name, what it is for
    ("recipe", "the whole recipe"),
    ("log", "what the run said"),
    ("metrics", "its figures"),
    ("curves", "its figures as a picture"),
    ("samples", "originals above reconstructions"),
    ("drift", "how far fine-tuning moved the latents"),
    ("unreadable", "files that could not be used"),
)


def describe_run(folder: Path) -> dict[str, str]:
    """Name of a property => its value, in the order to be shown."""
    run = RunDirectory(folder)
    settings, metrics = run.settings(), run.read_metrics()
    training = settings.get("training") or {}
    images_seen, status = _images_seen(run, metrics), run.read_status()
    state = _state(run, status, is_whole=images_seen >= training.get("total_images", 0))
    is_over = state.startswith("finished")
    rows = {"what": f"training run, {state}", "trains": _trained(settings), "data": _data(settings)}
    rows["batch"] = _batch(training)
    expected = status.get("expected_images") if state.startswith("running") else None
    rows["progress"] = _progress(training, metrics, images_seen, expected, is_over=is_over)
    ahead = [change for change in changes_planned(settings) if change.images > images_seen]
    if ahead and not is_over:
        rows["next"] = ", ".join(f"{change.what} from {short_images(change.images)}" for change in ahead)
    rows |= _figures(run, metrics)
    checkpoints = run.all_checkpoints()
    rows["checkpoints"] = _checkpoints(checkpoints)
    for name, path in (("best", run.best), ("model", run.model)):
        if (path / "config.json").is_file():
            at = (saved_metrics(path) or {}).get("images_seen")
            rows[name] = f"{path} ({size(_bytes(path))}{f', after {at:,} images' if at is not None else ''})"
    present = [(getattr(run, name), what) for name, what in FILES]
    rows["files"] = ", ".join(f"{path.name} ({what})" for path, what in present if path.exists())
    if not state.startswith(("finished", "running")):
        rows["continue with"] = f"latentvae train --recipe {run.recipe} --out {run.path} --resume auto"
    warnings = CollapseMonitor.replayed(settings, metrics).standing.values()
    for number, warning in enumerate(warnings, start=1):
        rows[f"warning {number}" if len(warnings) > 1 else "warning"] = warning
    return rows


def describe_checkpoint(folder: Path) -> dict[str, str]:
    """The same of one checkpoint folder; UserError where its state.json cannot be read."""
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {folder / STATE_FILE}: {one_line(error)}") from error
    if not isinstance(state, dict):
        raise UserError(f"{folder / STATE_FILE} does not hold a JSON object")
    settings = state.get("recipe") or {}
    reason = damage(folder)
    rows = {"what": "training checkpoint" + (f", damaged: {reason}" if reason else ", whole")}
    rows["images seen"] = _of_total(state.get("images_seen"), (settings.get("training") or {}).get("total_images"))
    if isinstance(state.get("seconds"), int | float):
        rows["trained for"] = duration(state["seconds"])
    if settings:
        rows |= {"trains": _trained(settings), "data": _data(settings)}
    if state.get("metrics"):
        rows["validation"] = _measured(state["metrics"])
    for name in ("model", "ema"):
        if (folder / name / "config.json").is_file():
            what = "the trained weights" if name == "model" else "their average"
            rows[name] = f"{folder / name} ({what}, a diffusers folder, {size(_bytes(folder / name))})"
    others = sorted(path for path in folder.glob("*.safetensors"))
    rows["beside it"] = ", ".join(f"{path.name} ({size(path.stat().st_size)})" for path in others) or "nothing"
    run = folder.resolve().parent.parent
    if (run / "recipe.yaml").is_file():
        rows["continue with"] = f"latentvae train --recipe {run / 'recipe.yaml'} --out {run} --resume auto"
    return rows


def _state(run: RunDirectory, status: Mapping[str, Any], *, is_whole: bool) -> str:
    """`finished`, `running ...`, `stopped ...`, `failed ...` or `killed ...`; `is_whole`: all its images are seen."""
    try:
        state, written = status["state"], datetime.fromisoformat(status["written"])
        host, process = status["host"], status["process"]
        started, reason = status["process_started"], status["reason"]
    except (ValueError, KeyError, TypeError):
        return "finished" if (run.model / "config.json").is_file() else "not finished"
    ago = duration(max((datetime.now(UTC) - written).total_seconds(), 0))
    if state == "failed":
        return f"failed {ago} ago: {reason}"
    if state == "ended":
        if reason == "max_minutes":
            return "finished: its max_minutes are over"
        if reason == "finished" or is_whole:
            return "finished"
        return f"stopped{'' if reason == 'ended' else f' by {reason}'} {ago} ago"
    if host == socket.gethostname():
        if is_alive(process, started):
            return f"running (process {process}, since {status.get('began', 'some time')})"
        return f"killed: process {process} is gone, its last sign {ago} ago"
    silent = _seconds_silent(run)
    doubt = f"no sign of it for {duration(silent)}" if silent > SILENT_SECONDS else f"last sign {duration(silent)} ago"
    return f"running on {host} (process {process}; {doubt})"


def _seconds_silent(run: RunDirectory) -> float:
    newest = max(path.stat().st_mtime for path in (run.status, run.metrics, run.log) if path.exists())
    return max(time.time() - newest, 0.0)


def _images_seen(run: RunDirectory, metrics: Sequence[Mapping[str, Any]]) -> int:
    checkpoints = [int(path.name) for path in run.all_checkpoints()]
    return max([row["images_seen"] for row in metrics] + checkpoints, default=0)


def _trained(settings: Mapping[str, Any]) -> str:
    model, training = settings.get("model") or {}, settings.get("training") or {}
    start = model.get("start_from")
    own = [name for name, value in model.items() if value is not None and name not in ("preset", *_START)]
    changed = f" with its own {', '.join(own)}" if own else ""
    text = f"from {start}" if start else f"a new {model.get('preset', 'model')}{changed}"
    trainable, lora = training.get("trainable", "all"), training.get("lora")
    if lora:
        return f"{text}: a LoRA of rank {lora.get('rank')}"
    part = {"all": "all of it", "decoder": "the decoder alone"}.get(str(trainable))
    return f"{text}: {part or 'parameters that match ' + ', '.join(trainable)}"


def _data(settings: Mapping[str, Any]) -> str:
    data, validation = settings.get("data") or {}, settings.get("validation") or {}
    sources = [str(one.get("source")) for one in data.get("sources") or ()] or [str(data.get("source"))]
    text = f"{', '.join(sources)} at {data.get('resolution')} px"
    if validation.get("source"):
        return f"{text}; validation on {validation['source']}"
    fraction = validation.get("fraction")
    return f"{text}; {fraction:.3g} of it held out for validation" if fraction else text


def _batch(training: Mapping[str, Any]) -> str:
    micro = training.get("micro_batch_size")
    rate = training.get("learning_rate")
    forward = "as many in one forward as fit" if micro == "auto" else f"at most {micro} in one forward"
    return f"{training.get('global_batch_size')} images, {forward}; learning rate {rate}"


def _of_total(images: Any, total: Any) -> str:
    if not isinstance(images, int):
        return str(images)
    return progress_line(images, total, 0.0) if isinstance(total, int) else f"{images:,}"


def _progress(
    training: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    images_seen: int,
    expected: int | None,
    *,
    is_over: bool,
) -> str:
    rates = [row["images_per_second"] for row in metrics if row.get("images_per_second")]
    total = expected or training.get("total_images")
    if not isinstance(total, int):
        return f"{images_seen:,} images"
    line = f"{images_seen:,} images"
    if not is_over or images_seen >= total:  # else its time was up, and the total says nothing
        line = progress_line(images_seen, total, rates[-1] if rates and not is_over else 0.0)
    if rates:
        line += f", {rates[-1]:.3g} images/s"
    memory = [row["memory_bytes"] for row in metrics if row.get("memory_bytes")]
    line += f", {size(max(memory))} of memory" if memory else ""
    return line + (f"; at most {training['max_minutes']:g} minutes" if training.get("max_minutes") else "")


def _figures(run: RunDirectory, metrics: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The newest values of the terms, and the last and the best validation."""
    rows: dict[str, str] = {}
    logged = [row for row in metrics if "reconstruction" in row]
    if logged:
        rows["terms"] = main_figures(logged[-1])
    measured = [row for row in metrics if f"{VALIDATION}psnr" in row]
    if measured:
        plain = {name.removeprefix(VALIDATION): value for name, value in measured[-1].items()}
        rows["last validation"] = f"{_measured(plain)} (after {measured[-1]['images_seen']:,} images)"
    best = saved_metrics(run.best)
    if best:
        rows["best validation"] = f"{_measured(best)} (after {best['images_seen']:,} images)"
    elif len(measured) > 1:
        top = max(measured, key=lambda row: row[f"{VALIDATION}psnr"])
        rows["best validation"] = f"PSNR {top[f'{VALIDATION}psnr']:.2f} dB (after {top['images_seen']:,} images)"
    return rows


def _measured(metrics: Mapping[str, Any]) -> str:
    known = [text.format(metrics[name]) for name, text in NAMES.items() if name in metrics]
    if isinstance(metrics.get("latent_std"), float):
        known.append(f"latents {metrics['latent_mean']:.3g} \N{PLUS-MINUS SIGN} {metrics['latent_std']:.3g}")
    return ", ".join(known)


def measured_beside(folder: Path) -> dict[str, str]:
    """What metrics.json beside the weights of a trained model says, as a property; {} where there is none."""
    metrics = saved_metrics(folder)
    return {"measured": f"{_measured(metrics)} (after {metrics['images_seen']:,} images)"} if metrics else {}


def _checkpoints(checkpoints: Sequence[Path]) -> str:
    if not checkpoints:
        return "none yet"
    named = [f"{path.name} ({size(_bytes(path))}{', damaged' if damage(path) else ''})" for path in checkpoints[-4:]]
    more = f"{len(checkpoints) - 4} older, " if len(checkpoints) > 4 else ""
    return f"{more}{', '.join(named)} in {checkpoints[-1].parent}"


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
