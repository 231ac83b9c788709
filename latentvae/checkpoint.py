"""A model on disk: atomic save, strict load from wherever a model may lie, and hashes that identify it."""

import hashlib
import inspect
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_session
from safetensors import SafetensorError, safe_open
from torch import Tensor

from latentvae.errors import UserError
from latentvae.files import atomic_folder, canonical_json, write_json
from latentvae.model.autoencoder import AutoencoderKL, refuse_keys
from latentvae.model.hashes import weights_hash
from latentvae.model.scaling import LatentScaling
from latentvae.model.single_file import autoencoder_tensors, single_file_config

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WRITTEN_ONLY = ("block_out_channels", "force_upcast")  # by tiny and asymmetric classes that do not take them

# The config.json fields that, with the weights, decide what each half computes.
_ENCODER_FIELDS = ("in_channels", "down_block_types", "use_quant_conv")
_DECODER_FIELDS = ("out_channels", "up_block_types", "use_post_quant_conv")
_SHARED_FIELDS = (
    "block_out_channels",
    "layers_per_block",
    "act_fn",
    "latent_channels",
    "norm_num_groups",
    "mid_block_add_attention",
)


@dataclass(frozen=True)
class ModelHashes:
    """Hex sha256 that stand for a model, whatever the order, the sharding or the device of its weights.

    The dtype of the weights counts: a model rounded to half precision gives other latents.
    """

    encoder: str  # encoder and quant conv, and the fields that make latents
    decoder: str  # post-quant conv and decoder, and the fields that make reconstructions
    model: str  # both, and the latent scaling


def save_model(
    vae: AutoencoderKL, folder: str | Path, *, overwrite: bool = False, files: Mapping[str, str] | None = None
) -> Path:
    """Write a diffusers folder atomically: after a crash there is the old folder or the new one.

    `files`: texts to write beside the weights, by name (`README.md`, `metrics.json`).
    UserError if the folder exists (without `overwrite`), cannot be written, or the model carries an adapter.
    """
    with model_folder(vae, Path(folder), overwrite=overwrite) as temporary:
        for name, text in (files or {}).items():
            (temporary / name).write_text(text, encoding="utf-8", newline="\n")
    return Path(folder)


@contextmanager
def model_folder(vae: AutoencoderKL, folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that holds the model, to be added to; on success it becomes `folder`.

    UserError as `save_model` says; on any error `folder` stays as it was.
    """
    check_no_adapter(vae)
    check_replaceable(folder, overwrite)
    try:
        with atomic_folder(folder, overwrite=overwrite) as temporary:
            vae.save_pretrained(temporary)
            yield temporary
    except (OSError, SafetensorError) as error:  # the second where the disk is full
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot write the model to {folder}: {reason}") from error


def check_replaceable(folder: Path, overwrite: bool) -> None:
    """Raise a UserError if `folder` exists and is not to be overwritten, or is something else than a model."""
    if not folder.exists():
        return
    if not overwrite:
        raise UserError(f"{folder} exists already: choose another folder or allow overwriting")
    is_model = folder.is_dir() and ((folder / CONFIG_FILE).is_file() or not any(folder.iterdir()))
    if folder.is_symlink() or not is_model:
        raise UserError(
            f"{folder} is neither a model folder nor an empty one (a file, a link, or without {CONFIG_FILE}), "
            "so it is not overwritten: choose another"
        )


def check_no_adapter(vae: AutoencoderKL) -> None:
    """Raise a UserError if a peft adapter sits in the model: its names are not those of an autoencoder."""
    if getattr(vae, "peft_config", None):
        raise UserError(
            "the model carries an adapter and would not load again: merge it with fuse_lora() and unload_lora(), "
            "or save it alone with save_lora_adapter()"
        )


def load_model(
    source: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    torch_dtype: torch.dtype | None = None,
) -> AutoencoderKL:
    """Load a model, in eval mode, from a diffusers folder, a hub id or an LDM-layout `.safetensors` file.

    The weights become `torch_dtype`, float32 unless given. A single file holds no configuration: `config.json` beside
    it is used where there is one; otherwise the architecture is read from the tensors, and the other parts of a whole
    checkpoint tell its latent scaling. Where the hub cannot be reached, its local cache is used.
    UserError in one line for whatever the user can mend: nothing there, a pickle, another class, misfits.
    """
    options = {"subfolder": subfolder, "revision": revision, "variant": variant, "torch_dtype": torch_dtype}
    vae: AutoencoderKL = load_class(source, {"AutoencoderKL": AutoencoderKL}, **options)
    return vae


def load_class(source: str | Path, classes: Mapping[str, Any], **options: Any) -> Any:
    """`load_model` for several classes: by the name in config.json, the diffusers class that reads such a folder.

    Args:
        source: as in `load_model`; a single file is an AutoencoderKL.
        classes: what is allowed. UserError for any other class, and for a missing or unexpected weight of any.
        options: those of `load_model`; None means not given.
    """
    path = Path(source).expanduser()
    options = {key: value for key, value in options.items() if value is not None}
    options["disable_mmap"] = True  # Windows neither replaces nor deletes a file while it is mapped
    if path.is_dir():
        if "revision" in options:
            raise UserError(f"{path} is a folder: a revision is for hub ids only")
        _check_folder(path, options.get("subfolder"))
        return _from_pretrained(path, classes, options)
    if path.is_file():
        if options.keys() & {"subfolder", "revision", "variant"}:
            raise UserError(f"{path} is a single file: subfolder, revision and variant do not apply to it")
        return _from_single_file(path, options)
    if path.suffix.lower() not in (*PICKLE_SUFFIXES, ".safetensors") and _HUB_ID.fullmatch(str(source)):
        return _from_hub(str(source), classes, options)
    raise UserError(f"no model at {source}: give a diffusers folder, a .safetensors file or a hub id (owner/name)")


_PICKLE_ADVICE = "a pickle, which can run code when it is read: `latentvae convert` reads it safely and writes a folder"


def _check_folder(folder: Path, subfolder: str | None) -> None:
    """Raise a UserError that says what is missing in a local model folder, and where a model is instead."""
    inside = folder / subfolder if subfolder else folder
    if not (inside / CONFIG_FILE).is_file():
        for name in ("vae", "model"):
            if (folder / name / CONFIG_FILE).is_file():
                raise UserError(f"{inside} is not a model, but there is one in {folder / name}: give that")
        raise UserError(f"{inside} has no {CONFIG_FILE}: it is not a diffusers model folder")
    if any(inside.glob("*.safetensors")):
        return
    pickles = sorted(file.name for file in inside.iterdir() if file.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise UserError(f"{inside} has only {pickles[0]}, {_PICKLE_ADVICE}")
    raise UserError(f"{inside} has no weights (diffusion_pytorch_model.safetensors)")


def _from_pretrained(source: str | Path, classes: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """Load a local folder or a hub id, strictly; what diffusers raises becomes one line."""
    where = {key: options[key] for key in ("subfolder", "revision", "local_files_only") if key in options}
    try:
        with quiet_diffusers():
            config = AutoencoderKL.load_config(source, **where)
            if not isinstance(config, dict):
                raise UserError(f"{source} has a {CONFIG_FILE} that holds no fields")
            class_name = config.get("_class_name", "AutoencoderKL")
            if class_name not in classes:
                allowed = f"{', '.join(classes)} {'is' if len(classes) == 1 else 'are'} supported"
                raise UserError(f"{source} is a model of class {class_name}: only {allowed}")
            model, info = classes[class_name].from_pretrained(
                source, use_safetensors=True, output_loading_info=True, **options
            )
    except UserError:
        raise
    except (OSError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{source} cannot be loaded: {first_line(error)}") from error
    refuse_keys(source, info["missing_keys"], info["unexpected_keys"])
    known = {*inspect.signature(classes[class_name].__init__).parameters, *_WRITTEN_ONLY}
    unknown = [key for key in config if key not in known and not key.startswith("_")]
    if unknown:
        logger.warning("%s: fields of config.json that %s does not have: %s", source, class_name, ", ".join(unknown))
    return model


def _from_hub(source: str, classes: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """Load a hub id, from the local cache where the hub cannot be reached."""
    reachable = _hub_is_reachable()
    try:
        return _from_pretrained(source, classes, {**options, "local_files_only": not reachable})
    except UserError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        if reachable:
            raise UserError(f"{source} is neither a folder here nor a model on the hub: {error}") from error
        raise UserError(
            f"{source} is neither a folder here nor in the hub's local cache, and the hub cannot be reached"
        ) from error


def _from_single_file(path: Path, options: Mapping[str, Any]) -> AutoencoderKL:
    """Load an LDM-layout (or diffusers-layout) safetensors file, strictly."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise UserError(f"{path} is {_PICKLE_ADVICE}")
    if path.suffix.lower() != ".safetensors":
        raise UserError(f"{path} is not a model: give a diffusers folder, a .safetensors file or a hub id")
    try:
        if (path.parent / CONFIG_FILE).is_file():
            return _with_config(path, path.parent, options)
        with safe_open(path, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in list(file.keys())}
            config = single_file_config(shapes, path)
            tensors = {name: file.get_tensor(name) for name in autoencoder_tensors(shapes)}  # not all of a checkpoint
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be loaded: {first_line(error)}") from error
    try:
        return from_tensors(tensors, config, **options)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def from_tensors(tensors: dict[str, Tensor], config: Mapping[str, Any], **options: Any) -> AutoencoderKL:
    """The autoencoder in the tensors of a single file, with these fields of config.json.

    `options`: of diffusers' `from_single_file`. UserError where tensors and fields do not fit.
    """
    with tempfile.TemporaryDirectory() as folder:  # diffusers takes a folder or a hub id, not the fields
        write_json(Path(folder) / CONFIG_FILE, {"_class_name": "AutoencoderKL", **config})
        return _with_config(tensors, Path(folder), options)


def _with_config(source: Path | dict[str, Tensor], folder: Path, options: Mapping[str, Any]) -> AutoencoderKL:
    weights, name = (source, "the file") if isinstance(source, dict) else (str(source), str(source))
    try:
        with quiet_diffusers():
            return AutoencoderKL.from_single_file(weights, **{**options, "config": str(folder)})
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{name} cannot be loaded: {first_line(error)}") from error


def _hub_is_reachable() -> bool:
    """Whether the hub answers at all: one quick try, where downloads retry for half a minute."""
    try:
        # A proxy in between answers for a hub that it cannot reach.
        return bool(get_session().head(constants.ENDPOINT, timeout=3).status_code < 500)
    except Exception:  # the hub's library has changed its HTTP client, and with it the errors, more than once
        return False


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Mute diffusers' log lines about what is an error here anyway."""
    library = logging.getLogger("diffusers")
    level = library.level
    library.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        library.setLevel(level)


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def model_hashes(vae: AutoencoderKL) -> ModelHashes:
    """Hash a model's weights and the fields of its config.json that change what it computes."""
    state = vae.state_dict()
    config = dict(vae.config) | {"act_fn": "silu"}  # the only one there is, under two names
    encoder, decoder = (
        weights_hash({name: config[name] for name in (*fields, *_SHARED_FIELDS)}, state, prefixes)
        for fields, prefixes in (
            (_ENCODER_FIELDS, ("encoder.", "quant_conv.")),
            (_DECODER_FIELDS, ("decoder.", "post_quant_conv.")),
        )
    )
    scaling = LatentScaling.from_config(vae.config).to_dict()
    model = hashlib.sha256(canonical_json({"encoder": encoder, "decoder": decoder, "scaling": scaling})).hexdigest()
    return ModelHashes(encoder=encoder, decoder=decoder, model=model)
