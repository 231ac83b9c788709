"""The names and shapes of weights that a configuration asks for, and the two layouts that they come in."""

import math

import pytest
import torch

from latentvae.errors import UserError
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.model.ldm_layout import check_shapes, expected_shapes, ldm_name, ldm_tensors
from latentvae.model.presets import PRESETS
from tests.model.ldm import ldm_weights
from tests.model.pairs import RELEASED, TINY


@pytest.mark.parametrize("config", [*PRESETS.values(), *RELEASED.values(), TINY], ids=range(len(PRESETS) + 5))
def test_the_shapes_are_those_of_the_network(config):
    with torch.device("meta"):
        vae = AutoencoderKL(**config)
    assert expected_shapes(vae.config) == {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}


def test_the_published_kl_f8():
    """LDM's autoencoder_kl_32x32x4: facts of the released file."""
    shapes = expected_shapes(PRESETS["f8c4"])
    ldm = {ldm_name(name, 4): shape for name, shape in shapes.items()}
    assert len(ldm) == 248 and sum(math.prod(shape) for shape in ldm.values()) == 83_653_863
    assert {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.mid.block_2.norm1.bias": (512,),
        "encoder.mid.attn_1.norm.weight": (512,),
        "encoder.mid.attn_1.proj_out.bias": (512,),
        "encoder.norm_out.weight": (512,),
        "encoder.conv_out.weight": (8, 512, 3, 3),
        "decoder.conv_in.weight": (512, 4, 3, 3),
        "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "decoder.up.0.block.2.conv2.bias": (128,),
        "decoder.up.1.upsample.conv.weight": (256, 256, 3, 3),
        "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.norm_out.weight": (128,),
        "quant_conv.weight": (8, 8, 1, 1),
        "post_quant_conv.bias": (4,),
    }.items() <= ldm.items()
    assert "encoder.down.3.downsample.conv.weight" not in ldm and "decoder.up.0.upsample.conv.weight" not in ldm


@pytest.mark.parametrize("family", RELEASED)
def test_the_tensors_by_ldm_names(family):
    vae = AutoencoderKL(**RELEASED[family])
    ours, expected = ldm_tensors(vae.state_dict(), 4), ldm_weights(vae)
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)
    assert ours["decoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    assert ours["decoder.mid.attn_1.norm.weight"].shape == (64,)


def test_names_from_before_diffusers_0_15():
    old = {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out", "group_norm": "norm"}
    for theirs, ldm in old.items():
        assert ldm_name(f"encoder.mid_block.attentions.0.{theirs}.bias", 4) == f"encoder.mid.attn_1.{ldm}.bias"


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
@pytest.mark.parametrize("is_ldm", [True, False])
def test_the_first_misfit_is_named(prefix, is_ldm):
    vae = AutoencoderKL(**RELEASED["sd1"])
    weights = ldm_weights(vae) if is_ldm else vae.state_dict()
    whole = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    absent = "decoder.up.3.block.0.norm1.weight" if is_ldm else "decoder.up_blocks.0.resnets.0.norm1.weight"
    matrix = "decoder.mid.attn_1.q.weight" if is_ldm else "decoder.mid_block.attentions.0.to_q.weight"

    def check(shapes):
        check_shapes(shapes, vae.config, "the file", {name: prefix + name for name in shapes})

    check(whole)
    check(whole | {matrix: (64, 64, 1, 1)})  # either form of the matrices
    check(whole | {matrix: (64, 64)})
    for shapes, message in [
        ({name: shape for name, shape in whole.items() if name != absent}, f"lacks {prefix}{absent}, of shape 64$"),
        (whole | {absent: (32,)}, f"{prefix}{absent} is of shape 32, and 64 is needed"),
        (whole | {absent: (64, 1, 1)}, f"{prefix}{absent} is of shape 64x1x1, and 64 is needed"),
        (whole | {"encoder.x": (1,), "decoder.x": ()}, f"has {prefix}decoder.x and 1 more, which no"),
    ]:
        with pytest.raises(UserError, match=message):
            check(shapes)
