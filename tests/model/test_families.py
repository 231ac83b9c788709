"""The configuration of a single file from its tensors' names and shapes: the released models, at their full size."""

import pytest
import torch

from latentvae.errors import UserError
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.model.single_file import FAMILIES, autoencoder_tensors, recognised_family, single_file_config
from tests.model.ldm import ldm_weights

RELEASED = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "in_channels": 3,
    "out_channels": 3,
    "mid_block_add_attention": True,
    "force_upcast": True,
}
FORMS = {True: {"latent_channels": 4}, False: {"latent_channels": 16}}
SCALING = {  # from the released models' config.json
    "sd1": {"scaling_factor": 0.18215, "shift_factor": None, "sample_size": 512},
    "sdxl": {"scaling_factor": 0.13025, "shift_factor": None, "sample_size": 1024},
    "sd3": {"scaling_factor": 1.5305, "shift_factor": 0.0609, "sample_size": 1024},
    "flux1": {"scaling_factor": 0.3611, "shift_factor": 0.1159, "sample_size": 1024},
}


def shapes_of(has_quant, is_ldm, prefix="", **changes):
    quant = {"use_quant_conv": has_quant, "use_post_quant_conv": has_quant}
    with torch.device("meta"):
        vae = AutoencoderKL(**RELEASED | FORMS[has_quant] | quant | changes)
    weights = ldm_weights(vae, prefix) if is_ldm else {prefix + name: t for name, t in vae.state_dict().items()}
    return {name: list(tensor.shape) for name, tensor in weights.items()}


@pytest.mark.parametrize("is_ldm", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_released_models(family, is_ldm):
    has_quant = family in ("sd1", "sdxl")
    shapes = shapes_of(has_quant, is_ldm, "" if is_ldm else "vae.")
    quant = {"use_quant_conv": has_quant, "use_post_quant_conv": has_quant}
    expected = RELEASED | FORMS[has_quant] | quant | SCALING[family]
    assert single_file_config(shapes, "file", family=family) == expected
    changed = single_file_config(shapes, "file", family=family, scaling_factor=2.0)
    assert changed == expected | {"scaling_factor": 2.0}
    with torch.device("meta"):
        assert AutoencoderKL(**expected).config.scaling_factor == expected["scaling_factor"]


def test_the_diffusers_layout_does_not_tell_the_groups():
    """A preset of ours has other groups under the same names: guessing would decode to noise."""
    widths = {"block_out_channels": [32, 64, 64, 64], "norm_num_groups": 8}
    with pytest.raises(UserError, match=r"groups of its norms.*config\.json beside it"):
        single_file_config(shapes_of(True, False, **widths), "file", family="sd1")


def test_what_is_asked_in_vain():
    with pytest.raises(UserError, match="holds no autoencoder"):
        single_file_config({"model.weight": [1]}, "file")
    with pytest.raises(UserError, match="lacks weights"):
        single_file_config({"encoder.conv_in.weight": [1, 1, 3, 3]}, "file")
    assert recognised_family(["encoder.conv_in.weight"]) is None
    names = ["vae.encoder.a", "model.b", "vae.quant_conv.c"]
    assert autoencoder_tensors(names) == {"vae.encoder.a": "encoder.a", "vae.quant_conv.c": "quant_conv.c"}
