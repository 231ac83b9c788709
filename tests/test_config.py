"""Recipes and overrides: what is read, and that every mistake is one line that names the field."""

from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, Field, field_validator

from latentvae.config import dump_yaml, load_config
from latentvae.errors import UserError


class Loss(BaseModel, extra="forbid", frozen=True):
    reconstruction: Literal["l1", "l2"] = "l1"
    kl_weight: float = Field(2.08e-8, ge=0)
    start: int | None = None


class Training(BaseModel, extra="forbid", frozen=True):
    learning_rate: float = Field(1e-4, gt=0)
    micro_batch_size: int | Literal["auto"] = "auto"
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    betas: tuple[float, float] = (0.5, 0.9)
    seed: int = 0
    note: str = ""

    @field_validator("seed")
    @classmethod
    def not_unlucky(cls, seed: int) -> int:
        if seed == 13:
            raise ValueError("13 is unlucky: take another")
        return seed


class Whole(BaseModel, extra="forbid", frozen=True):
    loss: Loss = Loss()
    training: Training = Training()
    extra: Loss | None = None


@pytest.fixture
def write(tmp_path):
    def _write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def message(**arguments) -> str:
    with pytest.raises(UserError) as caught:
        load_config(Whole, **arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_no_file_gives_the_defaults():
    assert load_config(Whole) == Whole()


def test_file_then_overrides_in_their_order(write):
    path = write("loss:\n  kl_weight: 1e-6\ntraining: {seed: 3}\n")
    config = load_config(Whole, path, ["training.seed=4", "training.seed=5", "extra.start=1_000"])
    assert (config.loss.kl_weight, config.training.seed, config.extra.start) == (1e-6, 5, 1000)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),  # the YAML 1.1 boolean
        ("2024-01-01", "2024-01-01"),
        ("12:30", "12:30"),
        ("010", "010"),
        ("a=b", "a=b"),
        ("C:\\images", "C:\\images"),
        ('"1"', "1"),
        ("on", "on"),
    ],
)
def test_text_stays_text(text, value):
    assert load_config(Whole, None, [f"training.note={text}"]).training.note == value


def test_numbers_and_lists_are_what_they_look_like():
    config = load_config(Whole, None, ["training.learning_rate=3e-5", "training.betas=[0, .5]", "loss.start=null"])
    assert config.training.learning_rate == 3e-5
    assert config.training.betas == (0.0, 0.5)
    assert config.loss.start is None
    assert load_config(Whole, None, ["training.mixed_precision=no"]).training.mixed_precision == "no"


def test_an_empty_section_or_file_means_defaults(write):
    assert load_config(Whole, write("loss:\ntraining:\n  # nothing chosen\n")) == Whole()
    assert load_config(Whole, write("# only a comment\n")) == Whole()


@pytest.mark.parametrize("note", ["no", "1e-4", "2024-01-01", "true", "", "ünïcode: #", "null", "~", "1_000"])
def test_dump_and_load_are_inverse(write, note):
    config = Whole(loss=Loss(kl_weight=2.08e-8), training=Training(note=note, learning_rate=1e-5))
    assert load_config(Whole, write(dump_yaml(config))) == config


def test_unknown_key_suggests_the_sibling(write):
    path = write("loss:\n  kl_wieght: 1\n")
    assert message(file=path) == f"{path}: unknown key loss.kl_wieght; did you mean loss.kl_weight?"


def test_unknown_key_suggests_another_section():
    assert message(overrides=["loss.learning_rate=1"]) == (
        "--set: unknown key loss.learning_rate; did you mean training.learning_rate?"
    )
    assert message(overrides=["seed=1"]) == "--set: unknown key seed; did you mean training.seed?"


def test_unknown_key_without_a_near_one_lists_what_is_allowed():
    assert message(overrides=["loss.zzz=1"]) == (
        "--set: unknown key loss.zzz; allowed here: reconstruction, kl_weight, start"
    )
    assert message(overrides=["zzz.yyy=1"]) == "--set: unknown key zzz; allowed here: loss, training, extra"


def test_bounds_and_types_name_field_given_and_allowed(write):
    path = write("training:\n  learning_rate: -1\n")
    assert message(file=path) == f"{path}: training.learning_rate is -1; it must be greater than 0"
    assert message(overrides=["training.learning_rate=fast"]) == (
        "--set: training.learning_rate is 'fast'; it must be a valid number"
    )
    assert message(overrides=["loss.reconstruction=ll1"]) == (
        "--set: loss.reconstruction is 'll1'; it must be 'l1' or 'l2'; did you mean l1?"
    )


def test_members_of_a_union_are_one_problem():
    assert message(overrides=["training.micro_batch_size=many"]) == (
        "--set: training.micro_batch_size is 'many'; it must be a valid integer or it must be 'auto'"
    )


def test_own_checks_keep_their_words():
    assert message(overrides=["training.seed=13"]) == "--set: training.seed is 13; 13 is unlucky: take another"


def test_items_of_a_list_are_named():
    assert "training.betas.1 is 'x'" in message(overrides=["training.betas=[0, x]"])


def test_a_value_where_a_section_belongs():
    assert message(overrides=["loss=3"]) == (
        "--set: loss is 3; it is a section with the fields reconstruction, kl_weight, start"
    )
    assert "which has no fields" in message(overrides=["loss.kl_weight=1", "loss.kl_weight.x=1"])


def test_further_problems_are_counted():
    assert message(overrides=["loss.kl_weight=-1", "training.learning_rate=0"]).endswith("(and 1 more)")


def test_a_key_that_is_no_word():
    assert "a key must be a word" in message(overrides=["training={[1]: 2}"])


@pytest.mark.parametrize("text", ["training.seed", "=3", "training.=3", ".seed=1"])
def test_malformed_overrides(text):
    assert "section.field=value" in message(overrides=[text])


def test_broken_files(write, tmp_path):
    assert "cannot read the recipe" in message(file=tmp_path / "absent.yaml")
    assert "cannot read the recipe" in message(file=tmp_path)
    assert "not valid YAML" in message(file=write("a: [1"))
    assert "given twice" in message(file=write("loss: {start: 1}\nloss: {start: 2}\n"))
    assert "a recipe is a mapping" in message(file=write("- 1\n- 2\n"))
    assert "not valid YAML" in message(file=write("a: !!python/object:os.system x\n"))
    assert "the value is not valid YAML" in message(overrides=["training.note=[1"])
