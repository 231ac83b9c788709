"""Ship a model as one file in the LDM layout, alone or inside a whole checkpoint, proven by loading it back."""

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from latentvae.checkpoint import CONFIG_FILE, PICKLE_SUFFIXES, first_line
from latentvae.errors import UserError
from latentvae.export.insertion import HEADER_DTYPES, SafetensorsFile, write_exchanged
from latentvae.export.loaders import check_layout, comfyui_obstacle, scaling_warning
from latentvae.export.proof import (
    DTYPES,
    TOLERANCE,
    ExportDtype,
    ExportError,
    check_images,
    check_values,
    described,
    difference,
    known_dtype,
    outputs_of,
    private_copy,
)
from latentvae.export.report import SingleFileReport
from latentvae.export.single_file_proof import check_bytes, loaded_back
from latentvae.files import TEMPORARY_MARK, atomic_file
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.model.ldm_layout import ldm_name, ldm_tensors, shape_text
from latentvae.model.single_file import LDM_GROUPS, autoencoder_tensors, recognised_family

_SHORT = {dtype: name for name, dtype in DTYPES.items()}
# Not of a variant, which is loaded only where it is asked for by name.
_FOLDER_WEIGHTS = re.compile(r"diffusion_pytorch_model(-\d+-of-\d+)?\.safetensors")


def export_single_file(
    model: str | Path | AutoencoderKL,
    out: str | Path,
    *,
    dtype: ExportDtype | None = None,
    into: str | Path | None = None,
    any_shape: bool = False,
    overwrite: bool = False,
) -> SingleFileReport:
    """Write `out`, a .safetensors file with the names of the LDM code, and report it only after it was loaded back.

    ComfyUI and its like build the network from it, and `diffusers.AutoencoderKL.from_single_file` does with the
    model's config.json. Such files carry no latent scaling; `warnings` of the report says what loaders will take.
    Before the file appears under its name, plain diffusers and our own converter read it: its bytes must be those
    that were meant, its weights equal, and moments and reconstructions agree within 1e-4.

    Args:
        model: whatever `load_model` takes, or a model, which stays as it is.
        dtype: precision of the weights. None: as in the model's own files, where they lie here and all have one (a
            model from the hub: fp32); with `into`, that of the tensor that each replaces.
        into: a whole checkpoint, or a single file, whose autoencoder is exchanged for the model: `out` is a copy of it
            in which all other tensors and the metadata are the same to the last bit. Never changed itself.
        any_shape: also write what ComfyUI cannot build, for loaders that are given the model's config.json.
        overwrite: replace an existing `out`.

    Raises:
        UserError: nothing to load, `out` exists or cannot be written, a shape that no loader reads, a checkpoint
            whose autoencoder has other weights, weights that are not finite or do not fit fp16.
        ExportError: the file does not reproduce the model.
    """
    out = Path(out)
    if dtype is not None:
        known_dtype(dtype)
    checkpoint = None if into is None else Path(into).expanduser()
    _check_target(out, overwrite, [path for path in (model, checkpoint) if isinstance(path, str | Path)])
    source = None if checkpoint is None else _opened(checkpoint)
    vae = private_copy(model)
    config = dict(vae.config)
    check_layout(config)
    if source is None:
        _check_loaders(config, any_shape)
        precision = DTYPES[dtype or _stored_dtype(model)]
        kind = _Kind("", dict.fromkeys(vae.state_dict(), precision))
    else:
        kind = _fitted(vae, source, None if dtype is None else DTYPES[dtype])
    for name, tensor in vae.state_dict().items():
        check_values({name: tensor}, _SHORT[kind.dtypes[name]])
    sample = check_images(vae, None, None)
    unrounded = outputs_of(vae, sample)
    rounded = {name: tensor.to(kind.dtypes[name]) for name, tensor in vae.state_dict().items()}
    tensors = {kind.prefix + name: t for name, t in ldm_tensors(rounded, len(config["block_out_channels"])).items()}
    vae.load_state_dict({name: tensor.float() for name, tensor in rounded.items()})
    ours = outputs_of(vae, sample)
    with _whole_file(out) as temporary:
        if source is None:
            save_file(tensors, temporary, metadata={"format": "pt"})
        else:
            write_exchanged(source, tensors, temporary)
        check_bytes(temporary, tensors, source)
        theirs = loaded_back(temporary, tensors, vae, sample)
        moments = difference(theirs.moments, ours.moments)
        reconstruction = difference(theirs.reconstructions, ours.reconstructions)
        if not (moments <= TOLERANCE and reconstruction <= TOLERANCE):  # NaN is not either
            found = f"moments {moments:g}, reconstructions {reconstruction:g}"
            raise ExportError(f"plain diffusers gives other outputs, {TOLERANCE:g} is allowed: {found}")
    family = None if source is None else recognised_family(source.tensors)
    warning = scaling_warning(config, family)
    return SingleFileReport(
        file=out,
        dtype=", ".join(sorted({_SHORT[dtype] for dtype in kind.dtypes.values()})),
        num_tensors=len(tensors),
        num_parameters=sum(tensor.numel() for tensor in tensors.values()),
        num_bytes=out.stat().st_size,
        moments_difference=moments,
        reconstruction_difference=reconstruction,
        rounding_difference=difference(ours.reconstructions, unrounded.reconstructions),
        checked_on=described(sample, is_given=False),
        warnings=(warning,) if warning else (),
        notes=tuple(_notes(config, source)),
    )


@dataclass(frozen=True)
class _Kind:
    """How the weights are named and rounded in a file."""

    prefix: str  # before the names of the LDM layout
    dtypes: dict[str, torch.dtype]  # by diffusers' name


def _check_target(out: Path, overwrite: bool, sources: list[str | Path]) -> None:
    if out.suffix != ".safetensors":
        raise UserError(f"{out} is not the name of a single file: give one that ends in .safetensors")
    for source in sources:
        if out.exists() and os.path.exists(source) and out.samefile(source):
            raise UserError(f"{out} is what is read: give another name, it is never changed in place")
    if out.is_dir():
        raise UserError(f"{out} is a folder: choose another name")
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already: choose another file or allow overwriting")


def _opened(checkpoint: Path) -> SafetensorsFile:
    if checkpoint.suffix.lower() in PICKLE_SUFFIXES:
        raise UserError(f"{checkpoint} is a pickle, which can run code when it is read: give it as .safetensors")
    if not checkpoint.is_file():
        raise UserError(f"there is no checkpoint file {checkpoint}")
    return SafetensorsFile.read(checkpoint)


def _check_loaders(config: Mapping[str, Any], any_shape: bool) -> None:
    obstacle = comfyui_obstacle(config)
    if obstacle is not None and not any_shape:
        raise UserError(
            f"ComfyUI cannot build this model from a single file: {obstacle}; export it with --format diffusers, or "
            "pass --any-shape to write the file for loaders that are given its config.json"
        )


def _stored_dtype(model: str | Path | AutoencoderKL) -> str:
    """The precision in which a model lies here; fp32 where there are several, or none of those that exports have."""
    if not isinstance(model, str | Path):
        return _SHORT.get(model.dtype, "fp32")
    path = Path(model).expanduser()
    files = [file for file in path.glob("*.safetensors") if _FOLDER_WEIGHTS.fullmatch(file.name)]
    dtypes = set()
    for file in [path] if path.is_file() else files:
        stored = SafetensorsFile.read(file).tensors
        dtypes |= {stored[name].dtype for name in autoencoder_tensors(stored)}
    only = HEADER_DTYPES.get(dtypes.pop()) if len(dtypes) == 1 else None
    return "fp32" if only is None else _SHORT[only]


def _fitted(vae: AutoencoderKL, source: SafetensorsFile, dtype: torch.dtype | None) -> _Kind:
    """Names and precisions of a checkpoint's autoencoder; UserError, naming what differs, unless it is of our form."""
    names = autoencoder_tensors(source.tensors)
    if not names:
        raise UserError(f"{source.path} holds no autoencoder: no tensor named encoder.*, first_stage_model.* or vae.*")
    if vae.config.norm_num_groups != LDM_GROUPS:
        raise UserError(
            f"the model has norm_num_groups {vae.config.norm_num_groups}, and the autoencoder of a checkpoint has "
            f"{LDM_GROUPS}: it would compute something else there"
        )
    prefix = next(whole.removesuffix(bare) for whole, bare in names.items())
    weights, num_levels = vae.state_dict(), len(vae.config.block_out_channels)
    shapes = {prefix + name: tuple(tensor.shape) for name, tensor in ldm_tensors(weights, num_levels).items()}
    for name, shape in shapes.items():
        if name not in names:
            raise UserError(f"{source.path} holds another autoencoder: it has no {name}, which the model has")
        there = source.tensors[name]
        if there.shape != shape:
            raise UserError(
                f"{source.path} holds another autoencoder: {name} is {shape_text(there.shape)} there and "
                f"{shape_text(shape)} in the model"
            )
        if dtype is None and there.dtype not in HEADER_DTYPES:
            raise UserError(f"{source.path}: {name} is of type {there.dtype}: pass --dtype fp32, fp16 or bf16")
    surplus = sorted(names.keys() - shapes.keys())
    if surplus:
        raise UserError(f"{source.path} holds another autoencoder: it has {surplus[0]}, which the model lacks")
    stored = {name: source.tensors[prefix + ldm_name(name, num_levels)].dtype for name in weights}
    return _Kind(prefix, {name: dtype or HEADER_DTYPES[stored[name]] for name in weights})


@contextmanager
def _whole_file(out: Path) -> Iterator[Path]:
    """Yield the name of a file to write, beside `out` in a folder of its own; on success it becomes `out`.

    It ends in .safetensors: diffusers takes any other file for a pickle.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}{TEMPORARY_MARK}") as folder:
            yield Path(folder) / out.name
            with atomic_file(out) as temporary:
                os.replace(Path(folder) / out.name, temporary)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot write {out}: {reason}") from error


def _notes(config: Mapping[str, Any], source: SafetensorsFile | None) -> Iterator[str]:
    if source is not None:
        told = [name for name in source.metadata or {} if "hash" in name]
        if told:
            yield f"its metadata is as it was, and {', '.join(told)} is of the old weights"
        return
    obstacle = comfyui_obstacle(config)
    if obstacle is not None:
        yield f"ComfyUI cannot build it: {obstacle}; it loads where config.json is given, as {CONFIG_FILE} beside it"
