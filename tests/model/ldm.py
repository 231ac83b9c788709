"""The LDM layout of an AutoencoderKL's weights, written from ours."""


def ldm_name(name, levels):
    """The name of a weight in the LDM layout."""
    for level in range(levels):
        name = name.replace(f"down_blocks.{level}.resnets.", f"down.{level}.block.")
        name = name.replace(f"down_blocks.{level}.downsamplers.0.", f"down.{level}.downsample.")
        name = name.replace(f"up_blocks.{level}.resnets.", f"up.{levels - 1 - level}.block.")
        name = name.replace(f"up_blocks.{level}.upsamplers.0.", f"up.{levels - 1 - level}.upsample.")
    for new, old in {
        "mid_block.resnets.0": "mid.block_1",
        "mid_block.resnets.1": "mid.block_2",
        "mid_block.attentions.0": "mid.attn_1",
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
        "conv_shortcut": "nin_shortcut",
        "conv_norm_out": "norm_out",
    }.items():
        name = name.replace(new, old)
    return name


def ldm_weights(vae, prefix=""):
    """The weights of an AutoencoderKL as an LDM, CompVis or Stability file holds them."""
    weights, levels = {}, len(vae.config.block_out_channels)
    for name, tensor in vae.state_dict().items():
        is_attention = "attentions" in name and tensor.ndim == 2  # 1x1 convolutions there
        weights[prefix + ldm_name(name, levels)] = tensor[:, :, None, None].contiguous() if is_attention else tensor
    return weights
