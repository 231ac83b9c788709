"""`AutoencoderKL`: diffusers' class with our networks inside. The only model file that imports diffusers."""

import functools
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import load_single_file_checkpoint
from torch import Tensor, nn

from latentvae.errors import UserError
from latentvae.model.encoder_decoder import Decoder, Encoder
from latentvae.model.presets import DOWN_BLOCK_TYPES, UP_BLOCK_TYPES, check_architecture, preset_config
from latentvae.model.single_file import autoencoder_tensors

DiffusersAutoencoderKL: Any = diffusers.AutoencoderKL  # type checkers see an empty stand-in under the lazy import
_INIT = DiffusersAutoencoderKL.__init__
_SIGNATURE = inspect.signature(_INIT)
CONFIG_FIELDS = tuple(name for name in _SIGNATURE.parameters if name != "self")  # of config.json
_SHARED_FIELDS = (  # what both networks are built from
    "latent_channels",
    "block_out_channels",
    "layers_per_block",
    "norm_num_groups",
    "mid_block_add_attention",
)

_DOWNLOAD_OPTIONS = ("force_download", "proxies", "token", "cache_dir", "local_files_only", "revision", "disable_mmap")


class AutoencoderKL(DiffusersAutoencoderKL):
    """A `diffusers.AutoencoderKL`: same config.json, parameter names and methods, other networks inside.

    Every pipeline takes it as `vae=`, and what it saves loads as plain `diffusers.AutoencoderKL`. Differences:
    a missing or unexpected weight is an error instead of a warning, weights are safetensors only, and the calls
    that exchange attention processors do nothing, since the attention here always is PyTorch's own fused one.
    """

    _no_split_modules = ("ResidualBlock", "SelfAttention")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        fields = {key: value for key, value in kwargs.items() if not key.startswith("_")}  # the rest is bookkeeping
        bound = _SIGNATURE.bind(self, *args, **fields)
        bound.apply_defaults()
        config = {name: bound.arguments[name] for name in CONFIG_FIELDS}
        check_architecture(config)
        with torch.device("meta"):  # diffusers' networks are replaced at once: no memory, no random numbers for them
            _INIT(self, *args, **kwargs)  # as it was called: the config records which fields were given

        latent_channels = config["latent_channels"]
        shared = {name: config[name] for name in _SHARED_FIELDS}
        self.encoder = Encoder(
            in_channels=config["in_channels"],
            has_attention=[DOWN_BLOCK_TYPES[name] for name in config["down_block_types"]],
            **shared,
        )
        self.decoder = Decoder(
            out_channels=config["out_channels"],
            has_attention=[UP_BLOCK_TYPES[name] for name in config["up_block_types"]],
            **shared,
        )
        if config["use_quant_conv"]:
            self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        if config["use_post_quant_conv"]:
            self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        # A saved pipeline names the library of each part from this: it must load where this package is not installed.
        self.__module__ = "diffusers"

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "AutoencoderKL":
        """A new model with random weights: a preset such as "f8c4-small", with config.json fields changed at will."""
        unknown = [key for key in overrides if key not in CONFIG_FIELDS]
        if unknown:
            raise UserError(f"{unknown[0]!r} is not a field of config.json; known: {', '.join(CONFIG_FIELDS)}")
        return cls(**(preset_config(name) | overrides))

    @classmethod
    def from_diffusers(cls, vae: Any) -> "AutoencoderKL":
        """Our class around the parameters of a plain `diffusers.AutoencoderKL`: the tensors are shared, not copied."""
        if not isinstance(vae, DiffusersAutoencoderKL):
            raise UserError(f"a {type(vae).__name__} was given: only diffusers' AutoencoderKL is supported")
        with torch.device("meta"):
            model = cls.from_config(vae.config)
        state = vae.state_dict(keep_vars=True)
        expected = dict(model.named_parameters())
        refuse_keys("the given model", expected.keys() - state.keys(), state.keys() - expected.keys())
        for name, parameter in expected.items():
            parameter.requires_grad_(state[name].requires_grad)  # loading would write ours on the shared tensor
        model.load_state_dict(state, assign=True)
        model.use_slicing, model.use_tiling = vae.use_slicing, vae.use_tiling
        model.tile_sample_min_size, model.tile_latent_min_size = vae.tile_sample_min_size, vae.tile_latent_min_size
        model.tile_overlap_factor = vae.tile_overlap_factor
        return model.train(vae.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As diffusers' method, but a missing or unexpected weight, or a pickle, is a UserError."""
        if kwargs.pop("use_safetensors", None) is False:
            raise UserError("use_safetensors=False asks for a pickle, which can run code: only safetensors are read")
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, use_safetensors=True, output_loading_info=True, **kwargs
        )
        refuse_keys(pretrained_model_name_or_path, info["missing_keys"], info["unexpected_keys"])
        return (model, info) if wants_info else model

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path_or_dict: Any = None, **kwargs: Any) -> Any:
        """As diffusers' method, but weights that do not fit the configuration, or a pickle, are a UserError."""
        source = pretrained_model_link_or_path_or_dict
        name = "the state dict" if isinstance(source, dict) else str(source)
        if not isinstance(source, dict):
            # Whatever ends otherwise is read as a pickle by diffusers; a URL may carry a query.
            if Path(name.partition("?")[0]).suffix != ".safetensors":
                raise UserError(f"{name} may be a pickle, which can run code when read: only .safetensors files are")
            options = {key: kwargs[key] for key in _DOWNLOAD_OPTIONS if key in kwargs}
            source = load_single_file_checkpoint(name, **options)
        tensors = autoencoder_tensors(source)
        if not tensors:
            raise UserError(f"{name} holds no autoencoder: no tensor named encoder.*, first_stage_model.* or vae.*")
        # Absent weights stay without memory ("meta"); diffusers then fails on them, or gives them to us.
        kwargs["low_cpu_mem_usage"] = True
        try:
            model = super().from_single_file(source, **kwargs)
        except NotImplementedError as error:
            raise UserError(f"{name} lacks weights that its config.json asks for ({len(tensors)} found)") from error
        missing = [key for key, parameter in model.named_parameters() if parameter.is_meta]
        refuse_keys(name, missing, ())
        # Names were mapped one to one, so that a difference in number is the layers that were passed over.
        if len(tensors) != len(model.state_dict()):
            raise UserError(
                f"{name} does not fit its config.json: it has {len(tensors)} autoencoder weights, "
                f"the configuration asks for {len(model.state_dict())}"
            )
        return model

    @property
    def downsample_factor(self) -> int:
        """f: pixels per latent position along each side."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def moments(self, images: Tensor) -> Tensor:
        """images [-1, 1] (B, C, H, W) => mean and log variance of the raw latents (B, 2D, H/f, W/f), untiled."""
        moments = self.encoder(images)
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def set_attn_processor(self, processor: Any) -> None:
        """Does nothing: the attention here is always PyTorch's `scaled_dot_product_attention`."""


# diffusers reads the fields of config.json from the signature.
functools.update_wrapper(AutoencoderKL.__init__, _INIT)


def refuse_keys(source: Any, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise a UserError that counts and names what does not fit."""
    for what, keys in (("lacks", sorted(missing)), ("has, and should not,", sorted(unexpected))):
        if keys:
            more = "" if len(keys) == 1 else f" and {len(keys) - 1} more"
            raise UserError(f"{source} does not fit its config.json: it {what} {keys[0]}{more}")
