"""Normalization against the pipelines' own code: their methods are called, or their very lines are run."""

import inspect
import textwrap
from types import SimpleNamespace

import diffusers
import pytest
import torch

from latentvae.autoencoders.adapter import load_autoencoder
from latentvae.model.scaling import LatentScaling
from tests.autoencoders.zoo import MODELS, make_model


class Given:
    """A vae with the real one's configuration and statistics, whose encoder gives the latents it was given."""

    def __init__(self, vae, raw):
        self.vae, self.raw = vae, raw

    def __getattr__(self, name):
        return getattr(self.vae, name)

    def encode(self, images):
        return SimpleNamespace(latents=self.raw)

    def decode(self, latents, **options):
        self.decoded = latents
        return (latents,)


def run_lines(function, first, last, **variables):
    """Run the lines of `function` from the last one that contains `first` before the one that contains `last`."""
    function = inspect.unwrap(function)
    lines = inspect.getsource(function).splitlines()
    end = max(index for index, line in enumerate(lines) if last in line)
    begin = max(index for index, line in enumerate(lines[: end + 1]) if first in line)
    exec(textwrap.dedent("\n".join(lines[begin : end + 1])), dict(function.__globals__), variables)
    return variables


def stable_diffusion(vae, latents):
    pipeline = diffusers.StableDiffusionImg2ImgPipeline
    line = "init_latents = self.vae.config.scaling_factor * init_latents"
    yield run_lines(pipeline.prepare_latents, line, line, self=SimpleNamespace(vae=vae), init_latents=latents)[
        "init_latents"
    ]
    normalized = yield
    pipeline.decode_latents(SimpleNamespace(vae=vae), normalized)
    yield vae.decoded


def stable_diffusion_xl(vae, latents):
    pipeline, this = diffusers.StableDiffusionXLImg2ImgPipeline, SimpleNamespace(vae=vae)
    mean_std = run_lines(
        pipeline.prepare_latents, "latents_mean = latents_std = None", "latents_std = torch.tensor", self=this
    )
    scaled = run_lines(
        pipeline.prepare_latents,
        "if latents_mean is not None and latents_std is not None:",
        "init_latents = self.vae.config.scaling_factor * init_latents",
        **mean_std | {"init_latents": latents, "device": latents.device, "dtype": latents.dtype},
    )
    yield scaled["init_latents"]
    normalized = yield
    first, last = "has_latents_mean = hasattr", "latents = latents / self.vae.config.scaling_factor"
    yield run_lines(pipeline.__call__, first, last, self=this, latents=normalized)["latents"]


def shifted(encoding, decoding):
    """SD3 and FLUX.1."""

    def steps(vae, latents):
        this = SimpleNamespace(vae=vae)
        yield encoding._encode_vae_image(this, None, None)
        normalized = yield
        line = "latents = (latents / self.vae.config.scaling_factor) + self.vae.config.shift_factor"
        yield run_lines(decoding.__call__, line, line, self=this, latents=normalized)["latents"]

    return steps


def flux2(vae, latents):
    pipeline = diffusers.Flux2Pipeline
    this = SimpleNamespace(
        vae=vae, _patchify_latents=pipeline._patchify_latents, _unpatchify_latents=pipeline._unpatchify_latents
    )
    yield pipeline._encode_vae_image(this, latents, None)  # an image of four dimensions is all it looks for
    normalized = yield
    first, last = "latents_bn_mean = self.vae.bn", "latents = self._unpatchify_latents(latents)"
    yield run_lines(pipeline.__call__, first, last, self=this, latents=normalized)["latents"]


def inpainting(vae, latents):
    pipeline, this = diffusers.StableDiffusionInpaintPipeline, SimpleNamespace(vae=vae)
    yield pipeline._encode_vae_image(this, None, None)
    normalized = yield
    first, last = "image = self.vae.decode(", ")[0]"
    run_lines(pipeline.__call__, first, last, self=this, latents=normalized, generator=None, condition_kwargs={})
    yield vae.decoded


def sana(vae, latents):
    this, line = SimpleNamespace(vae=vae), "control_image = control_image * self.vae.config.scaling_factor"
    prepare = diffusers.SanaControlNetPipeline.__call__
    yield run_lines(prepare, line, line, self=this, control_image=latents)["control_image"]
    normalized = yield
    line = "image = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]"
    run_lines(diffusers.SanaPipeline.__call__, line, line, self=this, latents=normalized)
    yield vae.decoded


def qwen_image(vae, latents):
    pipeline = diffusers.QwenImageImg2ImgPipeline
    vae.raw = latents[:, :, None]
    yield pipeline._encode_vae_image(SimpleNamespace(vae=vae), None, None)[:, :, 0]
    normalized = yield
    yield causal_decode(pipeline, vae, normalized)


def wan(vae, latents):
    pipeline, this = diffusers.WanVideoToVideoPipeline, SimpleNamespace(vae=vae)
    variables = {"init_latents": latents[:, :, None], "device": latents.device, "dtype": latents.dtype}
    first, last = "latents_mean = (", "init_latents = (init_latents - latents_mean) * latents_std"
    yield run_lines(pipeline.prepare_latents, first, last, self=this, **variables)["init_latents"][:, :, 0]
    normalized = yield
    yield causal_decode(pipeline, vae, normalized)


def causal_decode(pipeline, vae, normalized):
    first, last = "latents_mean = (", "latents = latents / latents_std + latents_mean"
    variables = {"self": SimpleNamespace(vae=vae), "latents": normalized[:, :, None]}
    return run_lines(pipeline.__call__, first, last, **variables)["latents"][:, :, 0]


FLUX1 = shifted(diffusers.FluxImg2ImgPipeline, diffusers.FluxPipeline)
PAIRS = [
    ("sd1", stable_diffusion),
    ("sdxl", stable_diffusion_xl),
    ("sdxl-statistics", stable_diffusion_xl),
    ("sd3", shifted(diffusers.StableDiffusion3InpaintPipeline, diffusers.StableDiffusion3Pipeline)),
    ("flux1", FLUX1),
    ("flux2", flux2),
    ("asymmetric", inpainting),
    ("tiny", FLUX1),  # shift_factor too
    ("tiny-sd", stable_diffusion),
    ("dc", sana),
    ("qwen-image", qwen_image),
    ("wan", wan),
    ("wan2.2", wan),
]


@pytest.mark.parametrize("name, pipeline", PAIRS, ids=[name for name, _ in PAIRS])
def test_normalization_is_the_pipelines(name, pipeline):
    model = make_model(name.removesuffix("-sd"))
    if name == "tiny-sd":
        model.register_to_config(shift_factor=0.0)  # SD's pipelines know no shift
    autoencoder = load_autoencoder(model)
    scaling = autoencoder.scaling
    generator = torch.Generator().manual_seed(1)
    raw = torch.randn(2, autoencoder.latent_channels, 6, 4, generator=generator) * 3 + 1

    steps = pipeline(Given(model, raw), raw)
    expected = next(steps)
    normalized = scaling.normalize(raw)
    torch.testing.assert_close(normalized, expected, rtol=1e-5, atol=1e-5)
    assert (normalized.shape != raw.shape) == (name == "flux2")
    assert name == "flux2" or (normalized - raw).abs().max() > 0.1  # the scaling is not the identity

    next(steps)
    given = torch.randn(normalized.shape, generator=generator)
    torch.testing.assert_close(scaling.denormalize(given), steps.send(given), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scaling.denormalize(normalized), raw, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scaling.normalize(scaling.denormalize(given)), given, rtol=1e-5, atol=1e-5)
    assert LatentScaling.from_dict(scaling.to_dict()) == scaling


def test_no_class_is_left_out():
    """tiny-pool: diffusers has no pipeline for it, and its latents are normalized as they are."""
    assert {name for name, _ in PAIRS} >= set(MODELS) - {"tiny-pool"}
    assert load_autoencoder(make_model("tiny-pool")).scaling == LatentScaling()


def test_flux2_statistics_include_the_epsilon():
    model = make_model("flux2")
    scaling = load_autoencoder(model).scaling
    assert scaling.patch == 2 and len(scaling.mean) == 4 * 3
    expected = (model.bn.running_var + 0.3).sqrt()
    assert scaling.std == tuple(expected.tolist()) and scaling.mean == tuple(model.bn.running_mean.tolist())
