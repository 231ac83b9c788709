"""Weight files of other tools => a diffusers folder, proven by loading it back. The only place that reads pickles."""

import copy
import pickle
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import diffusers
import torch
from safetensors import safe_open
from torch import Tensor

from latentvae.autoencoders.tiny import AutoencoderTinyPool, tiny_from_tensors
from latentvae.checkpoint import (
    PICKLE_SUFFIXES,
    check_replaceable,
    first_line,
    from_tensors,
    model_folder,
    quiet_diffusers,
)
from latentvae.errors import UserError
from latentvae.model.scaling import LatentScaling
from latentvae.model.single_file import autoencoder_tensors, recognised_family, single_file_config

Arch = Literal["auto", "sd1", "sdxl", "sd3", "flux1", "taesd"]
_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
# Both compute in float32 from the same weights; only the order of sums may differ.
_TOLERANCE = 1e-4


class ConvertError(RuntimeError):
    """What was written, loaded back, is not what was read: a fault of ours, not of the user."""


@dataclass(frozen=True)
class ConvertReport:
    """What was made."""

    folder: Path
    class_name: str  # that loads the folder
    num_parameters: int
    dtype: str  # of the weights, as in the files: "float16"
    scaling_factor: float
    shift_factor: float | None
    difference: float  # |a - b| / |b| of latents and images, loaded back against what was read; over a noise image
    notes: tuple[str, ...]


def convert_model(
    files: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    arch: Arch = "auto",
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
    overwrite: bool = False,
) -> ConvertReport:
    """Write the autoencoder in `files` as a diffusers folder with safetensors, in the precision that it has.

    Pickles are read with `torch.load(weights_only=True)`, which runs no code.

    Args:
        files: one LDM, CompVis or Stability file, or a whole Stable Diffusion; for a tiny autoencoder its encoder and
            its decoder, or the folder, or the beginning of the path, that both share.
        out: the folder; with `overwrite` a model that is there already is replaced.
        arch: the family, whose latent scaling the file does not hold ("taesd": tiny). "auto" recognises it, or refuses.
        scaling_factor, shift_factor: in place of the family's.

    Raises:
        UserError: unreadable, unsupported or ambiguous files, or a pickle that holds more than weights.
    """
    out = Path(out)
    if arch not in get_args(Arch):
        raise UserError(f"arch is {arch!r}: it must be one of {', '.join(get_args(Arch))}")
    check_replaceable(out, overwrite)
    paths = _found([Path(file).expanduser() for file in ([files] if isinstance(files, str | Path) else files)])
    read = [_read(path) for path in paths]
    if arch == "taesd" and not all(file.is_tiny for file in read):
        raise UserError(f"{paths[0]} is no tiny autoencoder of the taesd layout: its layers are not named by numbers")
    if all(file.is_tiny for file in read):
        if arch not in ("auto", "taesd"):
            raise UserError(f"{paths[0]} is a tiny autoencoder: convert it with --arch taesd")
        if scaling_factor is not None or shift_factor is not None:
            raise UserError("a tiny autoencoder's latents are normalized already: leave scaling and shift factor out")
        model, notes = _tiny(read)
    else:
        if len(paths) > 1:
            raise UserError(f"{len(paths)} files were given: only --arch taesd takes two, others lie in one")
        model, notes = _kl(read[0], arch, scaling_factor, shift_factor)
    for file in read:
        _check_numbers(file)
    with model_folder(model, out, overwrite=overwrite) as temporary:
        difference = _proven(temporary, model)
    return ConvertReport(
        folder=out,
        class_name=type(model).__name__,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        scaling_factor=model.config.scaling_factor,
        shift_factor=model.config.shift_factor,
        difference=difference,
        notes=tuple(notes),
    )


def _found(given: list[Path]) -> list[Path]:
    """The files themselves: a folder or the beginning of a path stands for an encoder and a decoder file."""
    if not given:
        raise UserError("no file was given")
    if len(given) > 1 or given[0].is_file():
        for path in given:
            if not path.is_file():
                raise UserError(f"there is no file {path}")
        return given
    where, prefix = (given[0], "") if given[0].is_dir() else (given[0].parent, given[0].name)
    files = sorted(where.iterdir()) if where.is_dir() else []
    files = [file for file in files if file.suffix in _SUFFIXES and file.name.startswith(prefix)]
    pair = []
    for part in ("encoder", "decoder"):
        found = [file for file in files if part in file.name.removeprefix(prefix)]
        if len(found) != 1:
            names = f"{len(found)}: {', '.join(file.name for file in found)}" if found else "none"
            raise UserError(
                f"{given[0]} is no file, and of the weight files that begin so one must be named *{part}* ({names})"
            )
        pair += found
    return pair


@dataclass(frozen=True)
class _Weights:
    """What was read of one file."""

    path: Path
    shapes: dict[str, list[int]]  # of every tensor in it
    tensors: dict[str, Tensor]  # of its autoencoder, where it holds more than that

    @property
    def is_tiny(self) -> bool:
        """Whether the names are those of a published tiny autoencoder: layers by number, with a part's name or not."""
        return all(re.match(r"((encoder|decoder)\.layers\.)?\d+\.", name) for name in self.tensors)

    def halves(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of a tiny encoder and decoder, as published; with parts' names the decoder counts from 0."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            part, _, rest = name.rpartition(".layers.")
            number, _, rest = rest.partition(".")
            own = parts.setdefault(part or ("encoder" if "0.weight" in self.tensors else "decoder"), {})
            own[f"{int(number) + (part == 'decoder')}.{rest}"] = tensor
        return parts


def _read(path: Path) -> _Weights:
    try:
        if path.suffix.lower() == ".safetensors":
            with safe_open(path, framework="pt") as file:
                if not list(file.keys()):
                    raise UserError(f"{path} holds no tensors")
                shapes = {name: list(file.get_slice(name).get_shape()) for name in list(file.keys())}
                return _Weights(path, shapes, {name: file.get_tensor(name) for name in _wanted(shapes)})
        if path.suffix.lower() not in PICKLE_SUFFIXES:
            raise UserError(f"{path} is no weight file: {', '.join(_SUFFIXES)} are")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))  # in the midst of advice to read it nevertheless
        problem = f"asks for {asked[1]}, more than weights" if asked else "is damaged, or holds more than weights"
        raise UserError(
            f"{path} {problem}, and reading it could run code: refused; take a .safetensors of it"
        ) from error
    except Exception as error:  # a damaged pickle raises whatever its bytes lead to
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    content = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors by name")
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    return _Weights(path, shapes, {name: tensors[name] for name in _wanted(shapes)})


def _wanted(names: Iterable[str]) -> list[str]:
    return list(autoencoder_tensors(names) or names)


def _tiny(files: list[_Weights]) -> tuple[Any, list[str]]:
    found = [(part, tensors) for file in files for part, tensors in file.halves().items()]
    parts = dict(found)
    if len(found) != 2 or len(parts) != 2:
        names = ", ".join(str(file.path) for file in files)
        raise UserError(
            f"{names}: one encoder and one decoder are needed, {' and '.join(part for part, _ in found)} given"
        )
    model = tiny_from_tensors(parts["encoder"], parts["decoder"])
    if isinstance(model, AutoencoderTinyPool):
        return model, ["it has pooled blocks, which diffusers lacks: latentvae loads the folder, plain diffusers not"]
    return model, []


def _kl(file: _Weights, arch: Arch, scaling_factor: float | None, shift_factor: float | None) -> tuple[Any, list[str]]:
    told = recognised_family(file.shapes)
    family = told if arch == "auto" else arch
    config = single_file_config(
        file.shapes, file.path, family=family, scaling_factor=scaling_factor, shift_factor=shift_factor
    )
    LatentScaling.from_config(config)  # refuses what no latents survive
    dtypes = {tensor.dtype for tensor in file.tensors.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    try:
        vae = from_tensors(file.tensors, config, torch_dtype=dtype)
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from error
    notes = []
    if told is not None and arch == "auto":
        notes.append(f"recognised as {told} by the other parts of the checkpoint")
    passed_over = Counter(
        name.removeprefix("first_stage_model.").partition(".")[0] for name in file.shapes if name not in file.tensors
    )
    if passed_over:
        parts = ", ".join(f"{part} ({number})" for part, number in sorted(passed_over.items()))
        notes.append(f"not of the autoencoder, and not read: {parts}")
    if scaling_factor is None:
        shift = "" if config["shift_factor"] is None else f" and shift_factor {config['shift_factor']}"
        notes.append(f"scaling_factor {config['scaling_factor']}{shift} is {family}'s, not read from the file")
    return vae, notes


def _check_numbers(file: _Weights) -> None:
    for name, tensor in file.tensors.items():
        if not tensor.is_floating_point():
            raise UserError(f"{file.path}: {name} is of {tensor.dtype}, which no weights are")
        if not tensor.float().isfinite().all():
            raise UserError(f"{file.path}: {name} is not finite: the file is damaged, or its training diverged")


@torch.no_grad()
def _proven(folder: Path, model: Any) -> float:
    """Load a written folder as its users will, and compare weights and outputs with what was read."""
    has_plain_class = not isinstance(model, AutoencoderTinyPool)
    loader = getattr(diffusers, type(model).__name__) if has_plain_class else AutoencoderTinyPool
    with quiet_diffusers():
        theirs = loader.from_pretrained(folder, disable_mmap=True)
    ours = copy.deepcopy(model).float()
    expected, found = ours.state_dict(), theirs.state_dict()
    if expected.keys() != found.keys() or any(not torch.equal(expected[name], found[name]) for name in expected):
        raise ConvertError(f"the weights in {folder} are not those that were read")
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(1, model.config.in_channels, 64, 64, generator=generator) * 2 - 1
    latents = _latents(ours.encode(images))
    pairs = [(_latents(theirs.encode(images)), latents), (theirs.decode(latents).sample, ours.decode(latents).sample)]
    # weights of zeros give zeros
    difference = max(float((a - b).norm() / b.norm().clamp(min=torch.finfo(b.dtype).tiny)) for a, b in pairs)
    if not difference <= _TOLERANCE:  # NaN is not either
        raise ConvertError(f"loaded back, {folder} gives other outputs: {difference:g}, {_TOLERANCE:g} is allowed")
    return difference


def _latents(encoded: Any) -> Tensor:
    latents: Tensor = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    return latents
