"""A model on disk: atomic save, strict load from wherever a model may lie, and hashes that identify it."""

import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_session
from safetensors import SafetensorError
from torch import Tensor

from latentvae.errors import UserError
from latentvae.files import atomic_folder, canonical_json
from latentvae.model.autoencoder import CONFIG_FIELDS, AutoencoderKL
from latentvae.model.scaling import LatentScaling

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

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
    folder = Path(folder)
    with model_folder(vae, folder, overwrite=overwrite) as temporary:
        for name, text in (files or {}).items():
            (temporary / name).write_text(text, encoding="utf-8", newline="\n")
    return folder


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
    it is used where there is one; otherwise diffusers recognises the family from the tensors and fetches its
    configuration from the hub. Where the hub cannot be reached, its local cache is used.
    UserError in one line for whatever the user can mend: nothing there, a pickle, another class, misfits.
    """
    path = Path(source).expanduser()
    options: dict[str, Any] = {
        "subfolder": subfolder,
        "revision": revision,
        "variant": variant,
        "torch_dtype": torch_dtype,
    }
    options = {key: value for key, value in options.items() if value is not None}
    options["disable_mmap"] = True  # Windows neither replaces nor deletes a file while it is mapped
    if path.is_dir():
        if revision is not None:
            raise UserError(f"{path} is a folder: a revision is for hub ids only")
        _check_folder(path, subfolder)
        return _from_pretrained(path, options)
    if path.is_file():
        if subfolder is not None or revision is not None or variant is not None:
            raise UserError(f"{path} is a single file: subfolder, revision and variant do not apply to it")
        return _from_single_file(path, options)
    if path.suffix.lower() not in (*PICKLE_SUFFIXES, ".safetensors") and _HUB_ID.fullmatch(str(source)):
        return _from_hub(str(source), options)
    raise UserError(f"no model at {source}: give a diffusers folder, a .safetensors file or a hub id (owner/name)")


_PICKLE_ADVICE = (
    "a pickle, which can run code when it is read: have the tool that wrote it save .safetensors, "
    "or read it with torch.load(weights_only=True) and write it with safetensors.torch.save_file"
)


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


def _from_pretrained(source: str | Path, options: Mapping[str, Any]) -> AutoencoderKL:
    """Load a local folder or a hub id, strictly; what diffusers raises becomes one line."""
    where = {key: options[key] for key in ("subfolder", "revision", "local_files_only") if key in options}
    try:
        with _quiet_diffusers():
            config = AutoencoderKL.load_config(source, **where)
            if not isinstance(config, dict):
                raise UserError(f"{source} has a {CONFIG_FILE} that holds no fields")
            class_name = config.get("_class_name", "AutoencoderKL")
            if class_name != "AutoencoderKL":
                raise UserError(f"{source} is a model of class {class_name}: only AutoencoderKL is supported")
            vae = AutoencoderKL.from_pretrained(source, **options)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{source} cannot be loaded: {first_line(error)}") from error
    unknown = [key for key in config if key not in CONFIG_FIELDS and not key.startswith("_")]
    if unknown:
        logger.warning("%s: fields of config.json that AutoencoderKL does not have: %s", source, ", ".join(unknown))
    return vae


def _from_hub(source: str, options: Mapping[str, Any]) -> AutoencoderKL:
    """Load a hub id, from the local cache where the hub cannot be reached."""
    reachable = _hub_is_reachable()
    try:
        return _from_pretrained(source, {**options, "local_files_only": not reachable})
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
    if (path.parent / CONFIG_FILE).is_file():
        options = {**options, "config": str(path.parent)}
    else:
        options = {**options, "local_files_only": not _hub_is_reachable()}
    try:
        with _quiet_diffusers():
            return AutoencoderKL.from_single_file(str(path), **options)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        advice = "" if "config" in options else f"; put the model's {CONFIG_FILE} beside it"
        raise UserError(f"{path} cannot be loaded: {first_line(error)}{advice}") from error


def _hub_is_reachable() -> bool:
    """Whether the hub answers at all: one quick try, where downloads retry for half a minute."""
    try:
        # A proxy in between answers for a hub that it cannot reach.
        return bool(get_session().head(constants.ENDPOINT, timeout=3).status_code < 500)
    except Exception:  # the hub's library has changed its HTTP client, and with it the errors, more than once
        return False


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
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
    encoder = _hash(vae, state, ("encoder.", "quant_conv."), _ENCODER_FIELDS + _SHARED_FIELDS)
    decoder = _hash(vae, state, ("decoder.", "post_quant_conv."), _DECODER_FIELDS + _SHARED_FIELDS)
    scaling = asdict(LatentScaling.from_config(vae.config))
    model = hashlib.sha256(canonical_json({"encoder": encoder, "decoder": decoder, "scaling": scaling})).hexdigest()
    return ModelHashes(encoder=encoder, decoder=decoder, model=model)


def _hash(vae: AutoencoderKL, state: Mapping[str, Tensor], prefixes: tuple[str, ...], fields: Iterable[str]) -> str:
    """Hex sha256 of the chosen config fields and, by sorted name, each tensor's name, dtype, shape and values."""
    architecture = {name: vae.config[name] for name in fields}
    architecture["act_fn"] = "silu"  # the only one there is, under two names
    digest = hashlib.sha256(canonical_json(architecture))
    for name in sorted(key for key in state if key.startswith(prefixes)):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]))
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
