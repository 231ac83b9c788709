"""All configuration of a run in one `Recipe`, and where recipes are found."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, Field

from latentvae.config import load_config
from latentvae.data.augment import DataConfig
from latentvae.errors import UserError
from latentvae.losses.config import LossConfig
from latentvae.model.presets import ModelConfig
from latentvae.training.config import TrainingConfig, ValidationConfig


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
