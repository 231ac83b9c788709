"""Presets, and what ModelConfig takes and refuses."""

import pytest
import torch
from pydantic import ValidationError

from latentvae.errors import UserError
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.model.presets import PRESETS, ModelConfig, preset_config

FAMILIES = ("f4c3", "f8c4", "f8c16", "f16c16", "f16c32", "f32c64")


def test_names_say_downsampling_and_channels():
    assert set(PRESETS) == {family + size for family in FAMILIES for size in ("", "-small", "-tiny")}
    for name in PRESETS:
        factor, channels = name.split("-")[0][1:].split("c")
        with torch.device("meta"):
            vae = AutoencoderKL.from_preset(name)
        assert vae.downsample_factor == int(factor)
        assert vae.config.latent_channels == int(channels)


def test_sizes():
    def millions(name):
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in AutoencoderKL.from_preset(name).parameters()) / 1e6

    assert millions("f8c4") == pytest.approx(83.65, abs=0.01)  # as SD 1.x
    assert 4 < millions("f8c4-small") < 6
    assert 1.5 < millions("f8c4-tiny") < 2.5


@pytest.mark.parametrize("name", PRESETS)
def test_four_channels_per_group_at_least(name):
    config = preset_config(name)
    assert all(width // config["norm_num_groups"] >= 4 for width in config["block_out_channels"])


def test_attention_lies_at_16_and_8_pixels():
    for name in PRESETS:
        config = preset_config(name)
        sides = [256 // 2**level for level in range(len(config["block_out_channels"]))]
        wanted = {"f16c16": [16], "f16c32": [16], "f32c64": [16, 8]}.get(name.split("-")[0], [])
        kinds = zip(sides, config["down_block_types"], reversed(config["up_block_types"]), strict=True)
        for side, down, up in kinds:
            assert ("Attn" in down) == ("Attn" in up) == (side in wanted), (name, side)


def test_new_models_have_neutral_scaling_that_their_pipeline_family_can_use():
    for name in PRESETS:
        config = preset_config(name)
        assert config["scaling_factor"] == 1.0
        assert config["shift_factor"] == (0.0 if name.startswith("f8c16") else None)


def test_a_preset_is_a_fresh_copy():
    preset_config("f8c4")["block_out_channels"].append(1)
    assert preset_config("f8c4")["block_out_channels"] == [128, 256, 512, 512]


def test_unknown_preset_gets_a_suggestion():
    with pytest.raises(UserError, match=r"f8c5.*did you mean 'f8c4'") as caught:
        preset_config("f8c5")
    assert "\n" not in str(caught.value)


def test_model_config_resolves_overrides():
    assert ModelConfig().resolved() == preset_config("f8c4")
    config = ModelConfig(preset="f8c4-tiny", in_channels=1, out_channels=1).resolved()
    assert config == preset_config("f8c4-tiny") | {"in_channels": 1, "out_channels": 1}
    AutoencoderKL(**config)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"preset": "f8c5"}, "did you mean"),
        ({"block_out_channels": [32, 64]}, "one per resolution"),
        ({"block_out_channels": [32, 64, 100, 128]}, "multiple of norm_num_groups"),
        ({"down_block_types": ["CrossAttnDownBlock2D"] * 4}, "not supported"),
        ({"act_fn": "gelu"}, "not supported"),
        ({"latent_channels": 0}, "greater than or equal to 1"),
        ({"widht": 3}, "Extra inputs"),
        ({"start_from": "a/b", "latent_channels": 8}, "cannot be set with start_from"),
        ({"subfolder": "vae"}, "start_from is not set"),
    ],
)
def test_model_config_refuses(fields, message):
    with pytest.raises(ValidationError, match=message):
        ModelConfig(**fields)


def test_every_field_is_described():
    assert all(field.description for field in ModelConfig.model_fields.values())
