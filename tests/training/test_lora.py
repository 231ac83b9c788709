"""Low-rank updates: nothing at first, only they train, and merged they compute the same."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from latentvae.checkpoint import load_model, save_model
from latentvae.errors import UserError
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.training.config import LoRAConfig
from latentvae.training.ema import ExponentialMovingAverage
from latentvae.training.lora import (
    adapter_state,
    add_lora,
    has_adapter,
    load_adapter_state,
    lora_targets,
    plain_model,
)
from latentvae.training.optim import make_optimizer
from latentvae.training.step import AutoencoderStep
from tests.model.pairs import RELEASED, TINY, enliven, noise_images, relative

CONFIG = LoRAConfig(rank=3, alpha=6.0)


def make(config=TINY, lora=CONFIG, seed=0, dtype=torch.float32):
    vae = enliven(AutoencoderKL(**config)).to(dtype)
    if lora is not None:
        add_lora(vae, lora, seed)
    return vae


def live(vae, seed=5):
    """The same with updates that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return vae


def train(vae, steps=3, ema=None):
    """Steps of AdamW on a squared error; returns the loss of each."""
    optimizer = make_optimizer(vae.named_parameters(), learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    images = noise_images(2, 3, 16, 16).to(next(vae.parameters()).dtype)
    step, losses = AutoencoderStep(vae), []
    for _ in range(steps):
        output = step(images, torch.zeros(2, 4, 8, 8))
        loss = (output.reconstructions - images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if ema is not None:
            ema.update()
        losses.append(loss.item())
    return losses


def test_the_default_is_every_layer_of_the_decoder_but_the_last():
    vae = make(RELEASED["sd1"] | {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 2})
    layers = {n.removesuffix(".base_layer") for n, m in vae.named_modules() if n.endswith(".base_layer")}
    plain = AutoencoderKL(**vae.config)
    expected = {n for n, m in plain.decoder.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)} - {"conv_out"}
    assert layers == {f"decoder.{name}" for name in expected}
    assert any(name.endswith("to_out.0") for name in layers) and any(
        name.endswith("upsamplers.0.conv") for name in layers
    )
    assert type(vae.decoder.conv_out) is nn.Conv2d


def test_only_the_updates_train_and_they_start_as_nothing():
    plain, vae = make(lora=None), make()
    images = noise_images(2, 3, 16, 16)
    assert torch.equal(vae(images).sample, plain(images).sample)
    trained = {name for name, parameter in vae.named_parameters() if parameter.requires_grad}
    assert trained == set(adapter_state(vae)) and all(".lora_" in name for name in trained)
    assert has_adapter(vae) and not has_adapter(plain)


def test_every_update_gets_a_gradient_and_the_rest_stays():
    vae = make()
    before = {name: parameter.detach().clone() for name, parameter in vae.named_parameters()}
    losses = train(vae)
    assert losses[-1] < losses[0]
    changed = {n for n, parameter in vae.named_parameters() if not torch.equal(parameter, before[n])}
    assert changed == set(adapter_state(vae))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("targets", [None, (".*",)])
@torch.no_grad()
def test_the_merged_model_reconstructs_the_same(tmp_path, dtype, targets):
    vae = live(make(lora=LoRAConfig(rank=3, targets=targets), dtype=dtype))
    images = noise_images(2, 3, 16, 16).to(dtype)
    plain = plain_model(vae)
    expected = vae(images).sample
    assert relative(plain(images).sample, expected) < (1e-5 if dtype == torch.float32 else 1e-12)
    assert relative(make(lora=None, dtype=dtype)(images).sample, expected) > 1e-2  # the updates do matter
    fresh = AutoencoderKL(**TINY)
    assert plain.state_dict().keys() == fresh.state_dict().keys() and dict(plain.config) == dict(vae.config)
    assert {p.dtype for p in plain.parameters()} == {dtype} and not has_adapter(plain)
    assert plain.training == vae.training
    save_model(plain, tmp_path / "model")
    loaded = load_model(tmp_path / "model", torch_dtype=dtype)
    assert all(torch.equal(tensor, loaded.get_parameter(name)) for name, tensor in plain.named_parameters())


@torch.no_grad()
def test_merging_is_peft_s_own_and_leaves_the_model():
    vae = live(make())
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    plain = plain_model(vae).state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())
    for parameter in plain.values():
        parameter.add_(1)  # nothing is shared
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())
    plain = plain_model(vae).state_dict()
    vae.fuse_lora(safe_fusing=True)
    vae.unload_lora()
    for name, tensor in vae.state_dict().items():
        torch.testing.assert_close(plain[name], tensor, rtol=1e-5, atol=1e-6)


def test_without_an_adapter_the_model_is_given_back():
    vae = make(lora=None)
    assert plain_model(vae) is vae and adapter_state(vae) == {}


def test_the_seed_alone_decides_the_first_weights():
    torch.manual_seed(1)
    one = adapter_state(make(seed=3))
    torch.manual_seed(2)
    two, three = adapter_state(make(seed=3)), adapter_state(make(seed=4))
    assert all(torch.equal(one[name], two[name]) for name in one)
    drawn = [name for name in one if ".lora_A." in name]
    assert not any(torch.equal(one[name], three[name]) for name in drawn)
    for name in drawn:
        bound = one[name][0].numel() ** -0.5
        assert one[name].abs().max() <= bound and one[name].std().item() == pytest.approx(bound / 3**0.5, rel=0.25)
    wide = adapter_state(make(seed=3, dtype=torch.float64))
    assert all(torch.equal(one[name].double(), wide[name]) for name in one)


def test_adding_draws_nothing_from_the_shared_state():
    vae = make(lora=None)
    before = torch.get_rng_state()
    add_lora(vae, CONFIG, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_alpha_over_rank_scales_the_update():
    images = noise_images(1, 3, 16, 16)
    base = make(lora=None)(images).sample
    one, two = (live(make(lora=LoRAConfig(rank=2, targets=("decoder.conv_in",), alpha=a))) for a in (None, 4.0))
    first = plain_model(one).decoder.conv_in.weight - make(lora=None).decoder.conv_in.weight
    second = plain_model(two).decoder.conv_in.weight - make(lora=None).decoder.conv_in.weight
    torch.testing.assert_close(second, 2 * first)
    assert relative(one(images).sample, base) > 1e-3


def test_state_moves_bit_for_bit_through_a_file(tmp_path):
    vae = live(make()).to(memory_format=torch.channels_last)
    save_file(adapter_state(vae), tmp_path / "adapter.safetensors")
    other = make(seed=9)
    load_adapter_state(other, load_file(tmp_path / "adapter.safetensors"))
    for (name, a), b in zip(vae.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (LoRAConfig(rank=4), r"is \(3, .*the model's \(4, "),
        (LoRAConfig(rank=3, targets=("decoder.conv_in",)), "has 2|the model's 2"),
    ],
)
def test_a_state_of_another_lora_is_refused(lora, message):
    state, other = adapter_state(make()), make(lora=lora)
    before = adapter_state(other)
    with pytest.raises(UserError, match=message):
        load_adapter_state(other, state)
    assert all(torch.equal(before[name], tensor) for name, tensor in adapter_state(other).items())


@torch.no_grad()
def test_the_average_is_merged_where_it_is_applied():
    vae = make()
    ema = ExponentialMovingAverage(vae, 0.5, 0)
    with torch.enable_grad():
        train(vae, ema=ema)
    images = noise_images(1, 3, 16, 16)
    trained = plain_model(vae)(images).sample
    with ema.applied():
        average = plain_model(vae)
        expected = vae(images).sample
    assert relative(average(images).sample, expected) < 1e-5
    assert relative(average(images).sample, trained) > 1e-4
    base = {n: p for n, p in make(lora=None).named_parameters() if not n.startswith("decoder.")}
    assert all(torch.equal(average.get_parameter(name), tensor) for name, tensor in base.items())


def gradients(prepare=lambda vae: None):
    vae = live(make(dtype=torch.float64))
    prepare(vae)
    images = noise_images(2, 3, 16, 16).double()
    AutoencoderStep(vae)(images, torch.zeros(2, 4, 8, 8)).reconstructions.square().mean().backward()
    return {name: p.grad for name, p in vae.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "prepare",
    [lambda vae: vae.enable_gradient_checkpointing(), lambda vae: vae.to(memory_format=torch.channels_last)],
    ids=["gradient_checkpointing", "channels_last"],
)
def test_gradients_do_not_depend_on_memory(prepare):
    plain, other = gradients(), gradients(prepare)
    assert plain.keys() == other.keys() and plain
    for name, gradient in plain.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-9, atol=1e-12)


def test_channels_last_trains_and_merges_in_that_layout():
    vae = make().to(memory_format=torch.channels_last)
    losses = train(vae)
    assert losses == pytest.approx(train(make()), rel=1e-4)
    weight = plain_model(vae).decoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_bfloat16_autocast_keeps_float32_updates():
    vae = live(make())
    images = noise_images(1, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = vae.decoder.features(torch.zeros(1, 4, 8, 8))
        output = vae(images).sample
    assert features.dtype == torch.bfloat16 and relative(output, vae(images).sample) < 0.1
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("decoder.conv_uot",), r"training\.lora\.targets has 'decoder\.conv_uot'.*near names"),
        (("decoder.conv_out",), "decoder.conv_out is left out"),
        ((r"decoder\.conv_norm_out",), "matches the whole name of no convolution or projection"),
        (("(",), "not a regular expression"),
        ((), "empty list"),
    ],
)
def test_targets_that_are_none_are_refused(targets, message):
    vae = make(lora=None)
    with pytest.raises(UserError, match=message):
        add_lora(vae, LoRAConfig(targets=targets), 0)
    assert not has_adapter(vae) and all(parameter.requires_grad for parameter in vae.parameters())


def test_targets_by_regular_expression():
    names = lora_targets(make(lora=None), (r"encoder\.mid_block\..*", r".*\.to_[qkv]"))
    assert all(name.startswith("encoder.mid_block.") or name[-5:-1] == ".to_" for name in names)
    assert "encoder.mid_block.attentions.0.to_out.0" in names and not any("norm" in name for name in names)
    vae = make(lora=LoRAConfig(rank=2, targets=(".*",)))
    assert has_adapter(vae) and type(vae.decoder.conv_out) is nn.Conv2d
    assert any(name.startswith("quant_conv.lora_A") for name in adapter_state(vae))


def test_a_second_adapter_is_refused():
    vae = make()
    with pytest.raises(UserError, match="carries an adapter already"):
        add_lora(vae, CONFIG, 0)


def test_without_peft_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    vae = make(lora=None)
    with pytest.raises(UserError, match=r"latentvae\[lora\]"):
        add_lora(vae, CONFIG, 0)
    assert all(parameter.requires_grad for parameter in vae.parameters())


TWO = """
import sys, torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from latentvae.training.lora import adapter_state
from latentvae.training.optim import make_optimizer
from latentvae.training.step import AutoencoderStep
from safetensors.torch import save_file
from tests.training.test_lora import live, make
from tests.model.pairs import noise_images

distributed.init_process_group("gloo")
rank, size = distributed.get_rank(), distributed.get_world_size()
vae = live(make(dtype=torch.float64))
step = DistributedDataParallel(AutoencoderStep(vae))
optimizer = make_optimizer(vae.named_parameters(), learning_rate=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
for index in range(3):
    images = noise_images(4, 3, 16, 16, seed=index).double().chunk(size)[rank]
    output = step(images, torch.zeros(len(images), 4, 8, 8))
    (output.reconstructions - images).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
save_file(adapter_state(vae), f"{sys.argv[1]}_{rank}.safetensors")
distributed.destroy_process_group()
"""


@pytest.mark.multiprocess
def test_two_processes_give_the_updates_of_one(tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    states = {}
    for size in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(size)]
        command = [sys.executable, *launcher, str(tmp_path / "two.py"), str(tmp_path / f"of_{size}")]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stderr
        for rank in range(size):
            states[size, rank] = load_file(tmp_path / f"of_{size}_{rank}.safetensors")
    one, first, second = states[1, 0], states[2, 0], states[2, 1]
    start = adapter_state(live(make(dtype=torch.float64)))
    assert all(not torch.equal(one[name], start[name]) for name in one)
    assert all(torch.equal(first[name], second[name]) for name in one)
    assert max((one[name] - first[name]).abs().max().item() for name in one) < 1e-9
