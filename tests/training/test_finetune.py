"""Fine-tuning end to end: from where it can start, what stays, and what diffusion pipelines make of the result."""

import json
import os
import subprocess
import sys

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentvae.assembly import build
from latentvae.checkpoint import load_model, save_model
from latentvae.config import dump_yaml
from latentvae.convert import convert_model
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.recipe import load_recipe
from latentvae.training.drift import measure_drift
from latentvae.training.starting import StartingModel
from tests.model.ldm import ldm_weights
from tests.model.pairs import RELEASED, enliven, noise_images
from tests.training.test_drift import CPU, PIXELS, batches, pictures
from tests.training.test_trainer import assert_bit_identical, tensors_below

SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
NARROW = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 2, "layers_per_block": 1}
SETTINGS = (
    "data.resolution=32",
    "data.num_workers=0",
    "loss.reconstruction=l2",
    "loss.perceptual=none",
    "training.total_images=12",
    "training.global_batch_size=4",
    "training.learning_rate=1e-3",
    "training.ema_decay=0.5",
    "training.mixed_precision=no",
    "training.trackers=[]",
    "validation.fraction=0.25",
    "validation.num_pictures=0",
)
DECODER = "training.trainable=decoder"


def start(family="sd1", **changes):
    """A model of a released family at a small width, with weights that matter."""
    return enliven(AutoencoderKL(**RELEASED[family] | NARROW | changes)).eval()


def saved(folder, family="sd1", **changes):
    return save_model(start(family, **changes), folder / f"start_{family}")


def tuned(source, photographs, out, *settings, resume=None):
    """The trainer after its run, and the finished model's folder."""
    overrides = [f"model.start_from={source}", f"data.source={photographs}", *SETTINGS, *settings]
    trainer = build(load_recipe(None, overrides), out, resume=resume, progress=False)
    return trainer, trainer.train().model_folder


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def changed_names(old, new):
    return [name for name, parameter in old.named_parameters() if not torch.equal(parameter, new.get_parameter(name))]


@pytest.mark.parametrize("family", sorted(RELEASED))
def test_decoder_only_leaves_latents_and_scaling(photographs, tmp_path, family):
    source = saved(tmp_path, family)
    _, folder = tuned(source, photographs, tmp_path / "run", DECODER)
    old, new = load_model(source), load_model(folder)
    assert {name: config_of(folder)[name] for name in SCALING} == {name: config_of(source)[name] for name in SCALING}
    expected = [name for name, _ in old.named_parameters() if name.startswith(("decoder.", "post_quant_conv."))]
    assert changed_names(old, new) == expected
    images = noise_images(2, 3, 32, 32)
    assert torch.equal(old.moments(images), new.moments(images))
    report = measure_drift(StartingModel(old), new, batches(pictures(4, 32)), PIXELS, CPU)
    assert report.is_bit_identical and report.has_equal_scaling and report.psnr_new != report.psnr_old
    drift = json.loads((tmp_path / "run" / "drift.json").read_text())
    assert drift["is_bit_identical"] and drift["has_equal_scaling"] and drift["latent_mse"] == 0
    assert drift["psnr_new"] == pytest.approx(json.loads((folder / "metrics.json").read_text())["psnr"], abs=0.01)


def test_per_channel_scaling_stays(photographs, tmp_path):
    scaling = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.0, 2.0, 0.5, 1.5], "scaling_factor": 1.0}
    source = saved(tmp_path, "sdxl", **scaling)
    for trainable in ("decoder", "all"):
        _, folder = tuned(source, photographs, tmp_path / trainable, f"training.trainable={trainable}")
        assert {name: config_of(folder)[name] for name in scaling} == scaling


# From where it can start


def folder_of(path):
    return save_model(start(), path / "folder"), ()


def pipeline_of(path):
    """The autoencoder in its subfolder, as pipelines are stored."""
    save_model(start(), path / "pipeline" / "vae")
    return path / "pipeline", ("model.subfolder=vae",)


def half_precision_of(path):
    start().half().save_pretrained(path / "half", variant="fp16")
    return path / "half", ("model.variant=fp16",)


LDM = {"block_out_channels": (32, 32, 64, 64), "norm_num_groups": 32}  # LDM files imply 32 groups


def single_file_of(path):
    """LDM names, the configuration beside it."""
    vae = start(**LDM)
    (path / "single").mkdir()
    save_file(ldm_weights(vae), path / "single" / "vae.safetensors")
    vae.save_config(path / "single")
    return path / "single" / "vae.safetensors", ()


def full_checkpoint_of(path):
    """Inside a whole Stable Diffusion, which tells architecture and scaling."""
    others = {"cond_stage_model.transformer.weight": torch.zeros(1), "model.diffusion_model.out.weight": torch.zeros(1)}
    save_file(ldm_weights(start(**LDM), "first_stage_model.") | others, path / "whole.safetensors")
    return path / "whole.safetensors", ()


def converted_of(path):
    """A pickle of CompVis, by way of `convert`."""
    torch.save({"state_dict": ldm_weights(start(**LDM), "first_stage_model.")}, path / "model.ckpt")
    convert_model(path / "model.ckpt", path / "converted", arch="sd1")
    return path / "converted", ()


@pytest.mark.parametrize(
    "prepare",
    [folder_of, pipeline_of, half_precision_of, single_file_of, full_checkpoint_of, converted_of],
    ids=lambda prepare: prepare.__name__.removesuffix("_of"),
)
def test_training_starts_from(photographs, tmp_path, prepare):
    source, settings = prepare(tmp_path)
    expected = start() if prepare in (folder_of, pipeline_of, half_precision_of) else start(**LDM)
    if prepare is half_precision_of:
        expected = expected.half().float()
    _, folder = tuned(source, photographs, tmp_path / "run", DECODER, *settings)
    new = load_model(folder)
    changed = changed_names(expected, new)  # so the encoder is that of the start, bit for bit
    assert changed and all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)
    assert "encoder.conv_in.weight" not in changed and "decoder.conv_in.weight" in changed
    assert new.config.scaling_factor == 0.18215 and new.config.shift_factor is None
    assert diffusers.AutoencoderKL.from_pretrained(folder).config.scaling_factor == 0.18215


# What trains


def test_regular_expressions_choose_what_trains(photographs, tmp_path):
    source = saved(tmp_path)
    choice = r'training.trainable=["decoder\\.conv_out\\..*","decoder\\.up_blocks\\.3\\..*"]'
    _, folder = tuned(source, photographs, tmp_path / "run", choice)
    old = load_model(source)
    expected = [n for n, _ in old.named_parameters() if n.startswith(("decoder.conv_out.", "decoder.up_blocks.3."))]
    assert changed_names(old, load_model(folder)) == expected and expected


def test_an_anchor_holds_the_latents(photographs, tmp_path):
    source = saved(tmp_path)
    old, drifts = load_model(source), []
    for weight in (0, 100):
        settings = ("loss.kl_weight=0", f"loss.anchor_weight={weight}", "training.total_images=40")
        _, folder = tuned(source, photographs, tmp_path / str(weight), *settings)
        new = load_model(folder)
        assert "encoder.conv_in.weight" in changed_names(old, new)
        report = measure_drift(StartingModel(old), new, batches(pictures(4, 32)), PIXELS, CPU)
        assert not report.is_bit_identical
        drifts.append(report.latent_mse_normalized)
    assert drifts[1] < 0.5 * drifts[0]


def test_an_encoder_that_does_not_move_pays_nothing_to_the_anchor(photographs, tmp_path):
    source = saved(tmp_path)
    trainer, _ = tuned(source, photographs, tmp_path / "run", DECODER, "loss.anchor_weight=1")
    rows = [json.loads(line) for line in (trainer.run.path / "metrics.jsonl").read_text().splitlines()]
    anchors = [row["anchor"] for row in rows if "anchor" in row]
    assert anchors and max(anchors) == 0


LORA = ("training.lora.rank=2", "training.save_every_images=4", "training.keep_checkpoints=5")


def test_lora_ships_a_plain_model_and_keeps_what_it_does_not_touch(photographs, tmp_path):
    source = saved(tmp_path)
    trainer, folder = tuned(source, photographs, tmp_path / "run", *LORA)
    old, new = load_model(source), load_model(folder)
    changed = changed_names(old, new)
    assert changed and all(name.startswith("decoder.") and name.endswith(".weight") for name in changed)
    assert "decoder.conv_out.weight" not in changed and not any("norm" in name for name in changed)
    images = noise_images(1, 3, 32, 32)
    with torch.no_grad(), trainer.ema.applied():
        torch.testing.assert_close(new(images).sample, trainer.vae(images).sample, rtol=1e-4, atol=1e-5)
    assert {name: config_of(folder)[name] for name in SCALING} == {name: config_of(source)[name] for name in SCALING}
    for model in sorted((tmp_path / "run" / "checkpoints").glob("*/*/config.json")):
        assert load_model(model.parent).state_dict().keys() == old.state_dict().keys()


def test_lora_resumes_bit_for_bit(photographs, tmp_path):
    source = saved(tmp_path)
    straight, _ = tuned(source, photographs, tmp_path / "straight", *LORA)
    tuned(source, photographs, tmp_path / "resumed", *LORA, "training.total_images=4")
    resumed, folder = tuned(source, photographs, tmp_path / "resumed", *LORA, resume="auto")
    assert_bit_identical(
        tensors_below(straight.run.all_checkpoints()[-1]), tensors_below(folder.parent / "checkpoints" / "000000012")
    )
    assert_bit_identical(dict(straight.vae.named_parameters()), dict(resumed.vae.named_parameters()))


def test_a_resume_from_a_changed_start_is_refused(photographs, tmp_path):
    source = saved(tmp_path)
    settings = ("training.save_every_images=4", "loss.anchor_weight=1", "loss.kl_weight=0")
    tuned(source, photographs, tmp_path / "run", *settings, "training.total_images=4")
    weights = source / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(Exception, match="not what this run started from"):
        tuned(source, photographs, tmp_path / "run", *settings, resume="auto")


MANY = {
    "decoder": ("training.trainable=decoder",),
    "anchor": ("loss.anchor_weight=1", "loss.kl_weight=0"),
    "lora": ("training.lora.rank=2", r'training.lora.targets=["decoder\\.conv_in","encoder\\.mid_block\\..*"]'),
}


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", sorted(MANY))
def test_two_processes_fine_tune_as_one(photographs, tmp_path, kind):
    settings = ("training.parameter_dtype=float64", "training.micro_batch_size=2", *MANY[kind])
    overrides = [f"model.start_from={saved(tmp_path)}", f"data.source={photographs}", *SETTINGS, *settings]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_yaml(load_recipe(None, overrides)))
    weights, drifts = [], []
    for size in (1, 2):
        out = tmp_path / str(size)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(size)]
        command = [sys.executable, *launcher, "-m", "latentvae", "train", "--recipe", str(recipe), "--out", str(out)]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        weights.append(load_file(out / "checkpoints" / "000000012" / "model" / "diffusion_pytorch_model.safetensors"))
        drifts.append(json.loads((out / "drift.json").read_text()))
        assert "drift from the starting model over" in (out / "log.txt").read_text()
    one, two = weights
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-9
    assert drifts[0].keys() == drifts[1].keys()
    for name, value in drifts[0].items():
        assert drifts[1][name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    assert drifts[0]["is_bit_identical"] == (kind == "decoder")


@pytest.mark.slow
def test_a_decoder_learns_a_narrow_domain_from_photographs(shared_data, lpips_home, tmp_path):
    """From Caltech-101 to clothes: held-out PSNR and LPIPS improve, and no latent changes by a bit."""
    common = [
        "data.resolution=64",
        "loss.perceptual=squeeze",
        "training.global_batch_size=16",
        "training.trackers=[]",
        "training.ema_warmup_steps=20",
        "training.warmup_images=160",
        "validation.max_images=48",
        "validation.num_pictures=0",
    ]
    first = [
        f"data.source={shared_data('caltech101')}",
        "model.preset=f8c4-tiny",
        "loss.perceptual_weight=0.3",
        "training.total_images=1600",
        "training.learning_rate=2e-3",
        "training.ema_decay=0.98",
    ]
    source = build(load_recipe(None, [*common, *first]), tmp_path / "start", progress=False).train().model_folder
    second = [
        f"model.start_from={source}",
        f"data.source={shared_data('clothing')}",
        "loss.reconstruction=l2",
        "loss.perceptual_weight=0.1",
        "training.trainable=decoder",
        "training.total_images=960",
        "training.learning_rate=5e-4",
        "training.ema_decay=0.98",
        "validation.fraction=0.12",
    ]
    result = build(load_recipe(None, [*common, *second]), tmp_path / "run", progress=False).train()
    drift = json.loads((tmp_path / "run" / "drift.json").read_text())
    assert drift["is_bit_identical"] and drift["has_equal_scaling"]
    assert drift["psnr_new"] > drift["psnr_old"] + 0.2 and drift["psnr_new"] == drift["psnr_new_decoder"]
    untouched = build(
        load_recipe(None, [*common, *second, "training.total_images=16", "training.learning_rate=1e-12"]),
        tmp_path / "untouched",
        progress=False,
    ).train()
    assert untouched.metrics["psnr"] == pytest.approx(drift["psnr_old"], abs=0.01)
    assert result.metrics["lpips"] < untouched.metrics["lpips"] - 0.005


# What pipelines make of it


def generator():
    return torch.Generator().manual_seed(5)


def embeddings(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "cross_attention_dim": 16,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


def stable_diffusion(vae):
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=diffusers.UNet2DConditionModel(**UNET).eval(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipeline, {"prompt_embeds": embeddings(1, 8, 16), "guidance_scale": 1.0}


def stable_diffusion_xl(vae):
    sizes = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    unet = diffusers.UNet2DConditionModel(**UNET, **sizes, projection_class_embeddings_input_dim=16 + 6 * 4).eval()
    pipeline = diffusers.StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        add_watermarker=False,
    )
    given = {"prompt_embeds": embeddings(1, 8, 16), "pooled_prompt_embeds": embeddings(1, 16), "guidance_scale": 1.0}
    return pipeline, given


def stable_diffusion_3(vae):
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    ).eval()
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    given = {"prompt_embeds": embeddings(1, 8, 16), "pooled_prompt_embeds": embeddings(1, 16), "guidance_scale": 1.0}
    return pipeline, given


def flux(vae):
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    pipeline = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    return pipeline, {"prompt_embeds": embeddings(1, 8, 16), "pooled_prompt_embeds": embeddings(1, 16)}


PIPELINES = {"sd1": stable_diffusion, "sdxl": stable_diffusion_xl, "sd3": stable_diffusion_3, "flux1": flux}


@pytest.mark.parametrize("family", sorted(PIPELINES))
@torch.no_grad()
def test_a_pipeline_gives_what_the_trained_decoder_gives_by_hand(photographs, tmp_path, family):
    source = saved(tmp_path, family)
    with torch.enable_grad():
        trainer, folder = tuned(source, photographs, tmp_path / "run", DECODER)
    images, latents = [], []
    for model in (folder, source):
        torch.manual_seed(0)  # of the denoiser's weights
        pipeline, given = PIPELINES[family](diffusers.AutoencoderKL.from_pretrained(model).eval())
        pipeline.set_progress_bar_config(disable=True)
        given |= {"num_inference_steps": 2, "height": 32, "width": 32}
        images.append(pipeline(**given, generator=generator(), output_type="pt").images)
        latents.append(pipeline(**given, generator=generator(), output_type="latent").images)
    assert torch.equal(*latents)  # the denoiser sees nothing of a new decoder
    normalized = latents[0]
    if family == "flux1":
        normalized = pipeline._unpack_latents(normalized, 32, 32, pipeline.vae_scale_factor)
    config = RELEASED[family]
    raw = normalized / config["scaling_factor"] + config.get("shift_factor", 0.0)
    with trainer.ema.applied():
        by_hand = trainer.vae.decode(raw).sample
    assert images[0].shape == (1, 3, 32, 32) and images[0].std() > 0.02
    torch.testing.assert_close(images[0], (by_hand / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)
    assert (images[0] - images[1]).abs().max() > 1e-3  # of the start: another picture
