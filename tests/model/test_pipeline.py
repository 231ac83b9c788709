"""A Stable Diffusion pipeline of tiny random parts takes our autoencoder, and saves without a trace of us."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests.model.pairs import TINY, make_pair

WORDS = ["<|startoftext|>", "<|endoftext|>", "a</w>", "cat</w>", "c", "a", "t", "t</w>", "ca"]
MERGES = ["#version: 0.2", "c a", "ca t</w>"]

TOLERANCE = 1e-4  # of pixels in [0, 1]: rounding grows on its way through the steps

LOAD_ELSEWHERE = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "latentvae":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import numpy, torch
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1], safety_checker=None)
pipeline.set_progress_bar_config(disable=True)
assert type(pipeline.vae).__module__.startswith("diffusers."), type(pipeline.vae)
image = pipeline("a cat", num_inference_steps=2, height=16, width=16, output_type="np",
                 generator=torch.Generator().manual_seed(5)).images[0]
numpy.save(sys.argv[2], image)
assert "latentvae" not in sys.modules
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Everything but the autoencoder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("\n".join(MERGES) + "\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=8)
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    ).eval()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    return {"tokenizer": tokenizer, "text_encoder": text_encoder, "unet": unet, "scheduler": scheduler}


def build(kind, parts, vae):
    pipeline = kind(**parts, vae=vae, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipeline, **options):
    generator = torch.Generator().manual_seed(5)
    return pipeline("a cat", num_inference_steps=2, generator=generator, output_type="np", **options).images[0]


def test_text_to_image_and_saved_pipeline(parts, tmp_path):
    pipelines = [build(StableDiffusionPipeline, parts, vae) for vae in make_pair(TINY)]
    images = [run(pipeline, height=16, width=16) for pipeline in pipelines]
    assert images[0].shape == (16, 16, 3) and images[0].std() > 0.05
    np.testing.assert_allclose(images[0], images[1], atol=TOLERANCE)

    pipelines[0].save_pretrained(tmp_path / "pipeline")
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert not [file for file in (tmp_path / "pipeline").rglob("*.json") if "latentvae" in file.read_text()]
    command = [sys.executable, "-c", LOAD_ELSEWHERE, str(tmp_path / "pipeline"), str(tmp_path / "image.npy")]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    np.testing.assert_allclose(np.load(tmp_path / "image.npy"), images[0], atol=TOLERANCE)


def test_image_to_image(parts):
    start = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    images = [
        run(build(StableDiffusionImg2ImgPipeline, parts, vae), image=start, strength=0.9) for vae in make_pair(TINY)
    ]
    assert images[0].shape == (16, 16, 3) and images[0].std() > 0.05
    np.testing.assert_allclose(images[0], images[1], atol=TOLERANCE)


def test_tiling_and_slicing_through_the_pipeline(parts):
    images = []
    for vae in make_pair(TINY):
        pipeline = build(StableDiffusionPipeline, parts, vae)
        pipeline.vae.enable_tiling()
        pipeline.vae.enable_slicing()
        images.append(run(pipeline, height=24, width=24))
    np.testing.assert_allclose(images[0], images[1], atol=TOLERANCE)
