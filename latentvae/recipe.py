"""All configuration of a run in one `Recipe`: where recipes are found, and whether their parts fit each other."""

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.tracking import get_available_trackers
from pydantic import BaseModel, Field

from latentvae.checkpoint import load_model
from latentvae.config import flatten, load_config
from latentvae.data.augment import DataConfig
from latentvae.errors import UserError
from latentvae.losses.config import LossConfig
from latentvae.losses.perceptual import check_size
from latentvae.losses.structural import check_window
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.model.presets import ModelConfig
from latentvae.training.config import TrainingConfig, ValidationConfig
from latentvae.training.perturbation import smallest_scale

TO_BE_GIVEN = "???"  # in a recipe: the user must say it


class Recipe(BaseModel, extra="forbid", frozen=True):
    """Everything that decides a training run."""

    model: ModelConfig = Field(default_factory=ModelConfig, description="which autoencoder")
    data: DataConfig = Field(default_factory=DataConfig, description="which images, and how they are cut")
    loss: LossConfig = Field(default_factory=LossConfig, description="what is minimised")
    training: TrainingConfig = Field(default_factory=TrainingConfig, description="how, and for how long")
    validation: ValidationConfig = Field(default_factory=ValidationConfig, description="what is looked at meanwhile")


def shipped_recipes() -> dict[str, Path]:
    """Name => file of every recipe that comes with the package (train/recipes in a clone)."""
    for folder in (Path(__file__).parent / "recipes", Path(__file__).parents[1] / "train" / "recipes"):
        if folder.is_dir():
            return {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    raise FileNotFoundError("the package was installed without its recipes")


def load_recipe(name_or_file: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from a file or the name of a shipped one, with `section.field=value` overrides; None: the defaults.

    Raises:
        UserError: no such recipe, an unknown field (with a suggestion), a value out of its range.
    """
    if name_or_file is None:
        return load_config(Recipe, None, overrides)
    file = Path(name_or_file)
    if not file.is_file():
        known = shipped_recipes()
        if str(name_or_file) not in known:
            raise UserError(f"no recipe {name_or_file}: give a YAML file or one of {', '.join(known)}")
        file = known[str(name_or_file)]
    return load_config(Recipe, file, overrides)


def require_given(recipe: Recipe) -> None:
    """Raise a UserError that names a field which the recipe leaves to the user (`???`) and nobody set."""
    for name, value in flatten(recipe.model_dump(mode="json")).items():
        if value == TO_BE_GIVEN:
            raise UserError(f"{name} is not set: this recipe needs it, pass --set {name}=...")
    _ = recipe.data.all_sources  # refuses both and neither


def check(recipe: Recipe, vae: AutoencoderKL) -> None:
    """Raise a UserError where the parts of a recipe do not fit each other; no image is read and nothing is written."""
    channels = vae.config.in_channels
    if vae.config.out_channels != channels:
        raise UserError(
            f"the model has {channels} input and {vae.config.out_channels} output channels; they must agree"
        )
    loss, data, config = recipe.loss, recipe.data, recipe.training
    factor = vae.downsample_factor
    cut_by = "resolution"
    if data.curriculum or data.aspect_buckets is not None:
        cut_by = "curriculum" if data.aspect_buckets is None else "aspect_buckets"
    sides = [(f"data.{cut_by}", side) for size in data.image_sizes for side in size]
    for name, side in [*sides, ("validation.resolution", recipe.validation.resolution or data.resolution)]:
        if side % factor:
            verb = "is" if name.endswith("resolution") else "gives"
            raise UserError(f"{name} {verb} {side}; the model needs a multiple of {factor}")
        if loss.has_perceptual and loss.perceptual != "none":
            check_size(loss.perceptual, side)
        if loss.ssim_weight:
            check_window(side)
    if loss.has_adversarial:
        loss.discriminator.check_size(min(side for _, side in sides))
    if loss.equivariance:
        for size in data.image_sizes:
            smallest_scale(loss, latent_side=min(size) // factor, downsample_factor=factor)  # refuses what is too small
    if config.posterior_sigma is not None and config.lora is not None:
        raise UserError("training.lora would move the sigma that training.posterior_sigma sets: leave one of them out")
    if config.posterior_sigma is not None and config.trainable == "decoder":
        raise UserError(
            "training.posterior_sigma changes quant_conv or the encoder, which training.trainable=decoder freezes: "
            "leave one of them out"
        )
    if config.best_metric == "lpips" and not loss.has_perceptual:
        raise UserError("training.best_metric is lpips, which needs loss.perceptual: set that, or choose psnr or none")
    if recipe.model.start_from is None:
        asked = {
            "training.trainable": config.trainable != "all",
            "training.lora": config.lora is not None,
            "loss.anchor_weight": loss.anchor_weight > 0,
            "loss.autoencoder_start": loss.autoencoder_start > 0,
        }
        for name in (name for name, is_asked in asked.items() if is_asked):
            raise UserError(f"{name} is for fine-tuning: pass --set model.start_from=MODEL too, or leave it out")
    installed = [str(tracker) for tracker in get_available_trackers()]
    for tracker in recipe.training.trackers:  # Accelerate would leave one out without a word
        if tracker not in installed:
            raise UserError(
                f"training.trackers has {tracker}; usable here are {', '.join(installed)}: install its package, or "
                "leave it out"
            )


def make_model(recipe: Recipe) -> AutoencoderKL:
    """The starting model, or a new one with weights drawn from `training.seed`, in `training.parameter_dtype`.

    Raises:
        UserError: the starting model cannot be loaded, or fields of a new model are set beside it.
    """
    model, dtype = recipe.model, parameter_dtype(recipe.training)
    if model.start_from is not None:
        if model.overrides():
            field = next(iter(model.overrides()))
            raise UserError(f"model.{field} is set beside model.start_from: a starting model keeps its config")
        return load_model(
            model.start_from,
            subfolder=model.subfolder,
            revision=model.revision,
            variant=model.variant,
            torch_dtype=dtype,
        )
    with torch.random.fork_rng():
        torch.manual_seed(recipe.training.seed)
        vae = AutoencoderKL(**model.resolved())
    return vae.double() if dtype == torch.float64 else vae


def parameter_dtype(config: TrainingConfig) -> torch.dtype:
    """Of the trained weights."""
    return torch.float64 if config.parameter_dtype == "float64" else torch.float32
