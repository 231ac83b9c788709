"""The proof of a single file: its bytes, and what plain diffusers and our own converter read in it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from latentvae.checkpoint import CONFIG_FILE, first_line, from_tensors, quiet_diffusers
from latentvae.export.insertion import HEADER_DTYPES, SafetensorsFile, first_difference, tensor_bytes
from latentvae.export.proof import ExportError, Outputs, outputs_of
from latentvae.files import write_json
from latentvae.model.autoencoder import CONFIG_FIELDS, AutoencoderKL
from latentvae.model.single_file import LDM_GROUPS, autoencoder_tensors, single_file_config


def check_bytes(file: Path, tensors: Mapping[str, Tensor], source: SafetensorsFile | None) -> None:
    """ExportError unless the file holds these tensors, and of `source`, where there is one, all the others."""
    written = SafetensorsFile.read(file)
    if source is not None:
        wrong = first_difference(source, written, tensors)
        if wrong is not None:
            raise ExportError(f"{wrong} came back other than it was written")
        return
    if written.tensors.keys() != tensors.keys():
        raise ExportError(f"other weights came back: {sorted(written.tensors.keys() ^ tensors.keys())[:3]}")
    for name, tensor in tensors.items():
        stored = written.tensors[name]
        is_right = (HEADER_DTYPES[stored.dtype], stored.shape) == (tensor.dtype, tuple(tensor.shape))
        if not is_right or b"".join(written.pieces(name)) != tensor_bytes(tensor):
            raise ExportError(f"{name} came back with other values")


def loaded_back(file: Path, tensors: Mapping[str, Tensor], vae: AutoencoderKL, sample: Tensor) -> Outputs:
    """What plain diffusers makes of the file; ExportError unless it and our converter read the weights of `vae`."""
    config = {name: vae.config[name] for name in CONFIG_FIELDS}
    write_json(file.parent / CONFIG_FILE, {"_class_name": "AutoencoderKL", **config})
    stored = SafetensorsFile.read(file)
    is_alone = stored.tensors.keys() == tensors.keys()
    weights = {name: stored.load(name) for name in tensors}
    try:
        with quiet_diffusers():
            plain: Any = diffusers.AutoencoderKL.from_single_file(
                str(file) if is_alone else dict(weights),  # of a whole checkpoint its autoencoder only
                config=str(file.parent),
                torch_dtype=torch.float32,
                local_files_only=True,
                disable_mmap=True,
            )
    except Exception as error:
        raise ExportError(f"plain diffusers cannot load what was written: {first_line(error)}") from error
    _check_weights(plain, vae, "plain diffusers")
    if config["norm_num_groups"] == LDM_GROUPS:  # otherwise it is only read with a config.json
        shapes = {bare: weights[name].shape for name, bare in autoencoder_tensors(weights).items()}
        told = single_file_config(shapes, file, scaling_factor=config["scaling_factor"])
        form = ("block_out_channels", "layers_per_block", "latent_channels", "mid_block_add_attention")
        for name in (*form, "in_channels", "out_channels", "use_quant_conv", "use_post_quant_conv"):
            meant = list(config[name]) if isinstance(config[name], tuple) else config[name]
            if told[name] != meant:
                raise ExportError(f"the file tells {name} {told[name]!r} instead of {meant!r}")
        _check_weights(from_tensors(dict(weights), told, torch_dtype=torch.float32), vae, "our converter")
    return outputs_of(plain.eval(), sample)


def _check_weights(loaded: Any, vae: AutoencoderKL, reader: str) -> None:
    found, meant = loaded.state_dict(), vae.state_dict()
    if found.keys() != meant.keys():
        raise ExportError(f"{reader} reads other weights: {sorted(found.keys() ^ meant.keys())[:3]}")
    for name, tensor in meant.items():
        if not torch.equal(found[name], tensor):
            raise ExportError(f"{reader} reads other values of {name}")
