"""Our class behaves as diffusers' own: tiling, saving, adapters, copies, hooks; and stricter where it should."""

import copy
import inspect
import json
import pickle
from types import SimpleNamespace

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from latentvae.errors import UserError
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.model.presets import preset_config
from tests.model.pairs import TINY, make_pair, noise_images, relative

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def pair():
    return make_pair(TINY)


@torch.no_grad()
def assert_same(ours, theirs, side=16, tolerance=1e-5):
    images = noise_images(2, ours.config.in_channels, side, side)
    assert relative(ours(images).sample, theirs(images).sample) <= tolerance


def test_is_a_diffusers_autoencoder(pair):
    ours = pair[0]
    assert isinstance(ours, diffusers.AutoencoderKL) and type(ours).__name__ == "AutoencoderKL"
    # The methods that carry offloading hooks stay diffusers' own.
    assert not {"encode", "decode", "forward", "tiled_decode"} & set(vars(AutoencoderKL))
    assert inspect.signature(AutoencoderKL.__init__) == inspect.signature(diffusers.AutoencoderKL.__init__)
    assert json.loads(ours.to_json_string()) == json.loads(pair[1].to_json_string())


def test_configuration_is_the_one_that_diffusers_keeps(pair, tmp_path):
    def comparable(vae):  # diffusers lists the defaulted fields in the order of a set
        return dict(vae.config) | {"_use_default_values": set(vae.config.get("_use_default_values", ()))}

    ours, theirs = pair
    assert comparable(ours) == comparable(theirs) and comparable(ours)["_use_default_values"]
    ours.save_pretrained(tmp_path)
    loaded = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    assert AutoencoderKL.from_pretrained(tmp_path).config == loaded.config
    assert AutoencoderKL.from_diffusers(loaded).config == loaded.config  # with where it came from


def test_positional_arguments_and_defaults():
    ours, theirs = AutoencoderKL(1, 1, norm_num_groups=8), diffusers.AutoencoderKL(1, 1, norm_num_groups=8)
    assert json.loads(ours.to_json_string()) == json.loads(theirs.to_json_string())
    theirs.load_state_dict(ours.state_dict())
    assert_same(ours, theirs)


def test_building_draws_no_random_numbers_for_the_replaced_networks():
    torch.manual_seed(0)
    vae = AutoencoderKL(**TINY)
    torch.manual_seed(0)
    assert torch.equal(torch.nn.Conv2d(3, 16, 3, padding=1).weight, vae.encoder.conv_in.weight)
    assert not any(parameter.is_meta for parameter in vae.parameters())


@torch.no_grad()
def test_tiling_and_slicing_give_the_same_numbers(pair):
    images = noise_images(2, 3, 24, 40)  # several 16-pixel tiles, the last ones cut
    for vae in pair:
        vae.enable_tiling()
        vae.enable_slicing()
    moments = [vae.encode(images).latent_dist.parameters for vae in pair]
    assert relative(*moments) <= 1e-5
    latents = moments[1].chunk(2, dim=1)[0]
    tiled = [vae.decode(latents).sample for vae in pair]
    assert relative(*tiled) <= 1e-5
    for vae in pair:
        vae.disable_tiling()
    untiled = pair[0].decode(latents).sample
    assert relative(untiled, tiled[0]) > 1e-3  # tiling was on
    pair[0].disable_slicing()
    assert relative(pair[0].decode(latents).sample, untiled) <= 1e-5


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda vae: pickle.loads(pickle.dumps(vae))], ids=["deep", "pickle"])
def test_copies(pair, copied):
    ours, theirs = pair
    twin = copied(ours)
    assert type(twin) is AutoencoderKL and twin.__module__ == "diffusers"
    assert twin.config == ours.config
    assert_same(twin, theirs)
    twin.decoder.conv_out.weight.data.zero_()
    assert ours.decoder.conv_out.weight.abs().sum() > 0


@torch.no_grad()
def test_compiles_without_graph_breaks(pair):
    ours, theirs = pair
    images = noise_images(1, 3, 16, 16)
    moments = torch.compile(ours.moments, backend="aot_eager", fullgraph=True)(images)
    assert relative(moments, theirs.encode(images).latent_dist.parameters) <= 1e-5
    decoder = torch.compile(ours.decoder, backend="aot_eager", fullgraph=True)
    latents = theirs.post_quant_conv(moments.chunk(2, dim=1)[0])
    assert relative(decoder(latents), theirs.decoder(latents)) <= 1e-5


def test_decoder_features_are_the_input_of_the_last_layer(pair):
    latents = torch.randn(1, 4, 4, 4)
    decoder = pair[0].decoder
    with torch.no_grad():
        assert torch.equal(decoder.conv_out(decoder.features(latents)), decoder(latents))


def test_save_and_load_with_shards_variant_and_dtype(pair, tmp_path):
    ours, theirs = pair
    ours.save_pretrained(tmp_path / "shards", max_shard_size="100KB", variant="fp16")
    names = [file.name for file in (tmp_path / "shards").iterdir()]
    assert sum(name.endswith(".safetensors") for name in names) > 2 and not any(".bin" in name for name in names)
    loaded = AutoencoderKL.from_pretrained(tmp_path / "shards", variant="fp16")
    assert type(loaded) is AutoencoderKL and not loaded.training
    assert_same(loaded, theirs)
    assert_same(diffusers.AutoencoderKL.from_pretrained(tmp_path / "shards", variant="fp16"), theirs)
    half = AutoencoderKL.from_pretrained(tmp_path / "shards", variant="fp16", torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_measured_scaling_is_saved(tmp_path):
    vae = AutoencoderKL.from_preset("f4c3-tiny")
    vae.register_to_config(scaling_factor=0.7, shift_factor=0.1)
    vae.save_pretrained(tmp_path)
    for loaded in (AutoencoderKL.from_pretrained(tmp_path), diffusers.AutoencoderKL.from_pretrained(tmp_path)):
        assert (loaded.config.scaling_factor, loaded.config.shift_factor) == (0.7, 0.1)
    again = AutoencoderKL.from_diffusers(diffusers.AutoencoderKL.from_pretrained(tmp_path))
    assert again.config.scaling_factor == 0.7


@pytest.mark.parametrize("sharded", [False, True])
def test_missing_and_unexpected_weights_are_errors(pair, tmp_path, sharded):
    ours, _ = pair
    for name in ("missing", "unexpected"):
        ours.save_pretrained(tmp_path / name, max_shard_size="100KB" if sharded else "1GB")
    if sharded:
        config = tmp_path / "missing" / "config.json"
        config.write_text(config.read_text().replace('"layers_per_block": 1', '"layers_per_block": 2'))
        config = tmp_path / "unexpected" / "config.json"
        config.write_text(config.read_text().replace('"use_quant_conv": true', '"use_quant_conv": false'))
    else:
        weights = load_file(tmp_path / "missing" / WEIGHTS)
        quant = {name: weights.pop(name) for name in ("quant_conv.weight", "quant_conv.bias")}
        more = weights | quant | {"extra": torch.zeros(1)}
        save_file(weights, tmp_path / "missing" / WEIGHTS, metadata={"format": "pt"})
        save_file(more, tmp_path / "unexpected" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks"):
        AutoencoderKL.from_pretrained(tmp_path / "missing")
    with pytest.raises(UserError, match="should not"):
        AutoencoderKL.from_pretrained(tmp_path / "unexpected")


def test_loading_info_and_pickles(pair, tmp_path):
    ours, _ = pair
    ours.save_pretrained(tmp_path / "model")
    model, info = AutoencoderKL.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert isinstance(model, AutoencoderKL) and not info["missing_keys"]
    ours.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    with pytest.raises(OSError, match="safetensors"):
        AutoencoderKL.from_pretrained(tmp_path / "pickle")
    with pytest.raises(UserError, match="pickle"):
        AutoencoderKL.from_pretrained(tmp_path / "pickle", use_safetensors=False)


def test_from_diffusers_shares_the_parameters(pair):
    _, theirs = pair
    theirs.encoder.requires_grad_(False)
    theirs.enable_tiling()
    theirs.tile_sample_min_size, theirs.tile_latent_min_size, theirs.tile_overlap_factor = 12, 6, 0.5
    ours = AutoencoderKL.from_diffusers(theirs)
    assert (ours.tile_sample_min_size, ours.tile_latent_min_size, ours.tile_overlap_factor) == (12, 6, 0.5)
    assert type(ours) is AutoencoderKL and ours.use_tiling and not ours.training
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.data_ptr() == expected[name].data_ptr()
        assert parameter.requires_grad == expected[name].requires_grad == (not name.startswith("encoder."))
    assert_same(ours, theirs)


def test_from_diffusers_refuses_what_is_no_plain_autoencoder(pair):
    _, theirs = pair
    with pytest.raises(UserError, match="a Conv2d was given"):
        AutoencoderKL.from_diffusers(torch.nn.Conv2d(1, 1, 1))
    theirs.add_adapter(LoraConfig(r=2, target_modules=["conv_out"]))
    with pytest.raises(UserError, match=r"the given model does not fit .* it lacks decoder.conv_out.bias") as caught:
        AutoencoderKL.from_diffusers(theirs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("targets", [["to_q", "to_v", "to_out.0"], ["conv1", "conv_out"]])
def test_peft_adapter_trains_and_merges_as_in_diffusers(pair, targets):
    images = noise_images(1, 3, 16, 16)
    for vae in pair:
        vae.add_adapter(LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=targets))
    ours, theirs = pair
    theirs.load_state_dict(ours.state_dict())
    for vae in pair:
        (vae(images).sample - images).abs().mean().backward()
    trained = [[p for p in vae.parameters() if p.requires_grad] for vae in pair]
    assert len(trained[0]) == sum("lora" in name for name, _ in ours.named_parameters())
    assert relative(*(torch.cat([p.grad.flatten() for p in parameters]) for parameters in trained)) <= 1e-4
    with torch.no_grad():
        adapted = ours(images).sample
        for vae in pair:
            vae.fuse_lora()
            vae.unload_lora()
            assert relative(vae(images).sample, adapted) <= 1e-5
    assert list(ours.state_dict()) == list(theirs.state_dict()) == list(AutoencoderKL(**TINY).state_dict())


@pytest.mark.parametrize("targets", [["to_q", "to_v", "to_out.0"], ["conv1", "conv_out"]])
def test_peft_adapter_changes_the_output_as_in_diffusers(pair, targets):
    ours, theirs = pair
    images = noise_images(1, 3, 16, 16)
    before = ours(images).sample.detach()
    for vae in pair:
        vae.add_adapter(LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=targets))
    names = [name for name, _ in ours.named_parameters() if "lora" in name]
    assert names == [name for name, _ in theirs.named_parameters() if "lora" in name] and names
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert relative(ours(images).sample, before) > 1e-3
        assert relative(ours(images).sample, theirs(images).sample) <= 1e-5
        ours.disable_adapters()
        assert relative(ours(images).sample, before) <= 1e-6


def test_offloading_hooks_fire_before_encode_and_decode(pair):
    class Counter(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    vae, counter = pair[0], Counter()
    add_hook_to_module(vae, counter)
    with torch.no_grad():
        vae.decode(vae.encode(noise_images(1, 3, 16, 16)).latent_dist.mode())
    assert counter.calls == 2


def test_layerwise_casting_and_offloading_reach_every_layer(pair):
    images = noise_images(1, 3, 16, 16)
    with torch.no_grad():
        full = pair[0](images).sample
        for vae in pair:
            vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        cast = [vae(images).sample for vae in pair]
        assert relative(*cast) <= 1e-5 and relative(cast[0], full) > 1e-3
        offloaded = cpu_offload(make_pair(TINY)[0], execution_device="cpu")
        assert all(parameter.is_meta for parameter in offloaded.parameters())
        assert relative(offloaded(images).sample, full) <= 1e-6


def test_upcasting_as_the_sdxl_pipelines_do_it(pair):
    """AnimateDiffSDXL asks the middle attention which processor it has."""
    ours = pair[0].half()
    diffusers.AnimateDiffSDXLPipeline.upcast_vae(SimpleNamespace(vae=ours))
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}


def test_attention_processor_calls_do_nothing(pair):
    ours, theirs = pair
    ours.set_default_attn_processor()
    ours.fuse_qkv_projections()
    ours.unfuse_qkv_projections()
    ours.set_attn_processor({"anything": None})
    assert ours.attn_processors == {}
    assert_same(ours, theirs)


def test_pieces_that_placement_must_not_split_exist(pair):
    kinds = {type(module).__name__ for module in pair[0].modules()}
    assert set(AutoencoderKL._no_split_modules) <= kinds


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"down_block_types": ("DownBlock2D",) * 2}, "down_block_types has 'DownBlock2D', which is not supported"),
        ({"up_block_types": ("UpBlock2D",) * 2}, "up_block_types has 'UpBlock2D'"),
        ({"act_fn": "relu"}, "act_fn 'relu' is not supported"),
        ({"block_out_channels": (16,)}, "down_block_types has 2 entries and block_out_channels has 1"),
        ({"up_block_types": ("UpDecoderBlock2D",)}, "up_block_types has 1 entries"),
        ({"block_out_channels": (16, 30)}, "30, not a multiple of norm_num_groups 4"),
        ({"block_out_channels": (16, 32.0)}, "32.0, not a multiple of norm_num_groups 4"),
        ({"block_out_channels": None}, "block_out_channels is None: give a list"),
        ({"down_block_types": ()}, "down_block_types is .*: give a list"),
        ({"latent_channels": "4"}, "latent_channels is '4': it must be a whole number"),
        ({"norm_num_groups": None}, "norm_num_groups is None"),
        ({"sample_size": None}, "sample_size is None"),
    ],
)
def test_unsupported_architectures_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        AutoencoderKL(**TINY | changes)


def test_from_preset_overrides():
    vae = AutoencoderKL.from_preset("f8c4-tiny", in_channels=1, out_channels=1)
    preset = preset_config("f8c4-tiny")
    changed = {name: vae.config[name] for name in preset if vae.config[name] != preset[name]}
    assert changed == {"in_channels": 1, "out_channels": 1}
    with pytest.raises(UserError, match="'latent_chanels' is not a field"):
        AutoencoderKL.from_preset("f8c4-tiny", latent_chanels=3)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 0.01), (torch.bfloat16, 0.05), (torch.float64, 1e-12)])
def test_runs_in_other_precisions(pair, dtype, tolerance):
    images = noise_images(1, 3, 16, 16).to(dtype)
    with torch.no_grad():
        samples = [vae.to(dtype)(images).sample for vae in pair]
    assert samples[0].dtype == dtype and relative(*samples) <= tolerance
