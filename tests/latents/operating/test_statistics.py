"""Statistics of a store, and what is written into a model."""

import json
from io import StringIO

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from rich.console import Console

from latentvae.autoencoders.adapter import load_autoencoder
from latentvae.checkpoint import save_model
from latentvae.errors import UserError
from latentvae.latents.operating.measured import write_measured
from latentvae.latents.operating.statistics import store_statistics
from latentvae.model.autoencoder import AutoencoderKL
from tests.autoencoders.zoo import make_model
from tests.latents.stores import tiny_vae
from tests.latents.written import write_store


def elements(made, name):
    """(C, all positions of all images) in float64."""
    parts = [tensors[name].double().flatten(1).numpy() for tensors in made.tensors.values()]
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("kind", ["moments", "mean", "sample"])
def test_figures_are_those_of_numpy_over_all_latents(tmp_path, kind, dtype):
    made = write_store(tmp_path / "store", store=kind, dtype=dtype, hflip=True)
    statistics = store_statistics(made.folder)
    values = elements(made, "sample" if kind == "sample" else "mean")
    within = np.exp(elements(made, "logvar")) if kind == "moments" else None
    for number, channel in enumerate(statistics.channels):
        assert_spread(channel, values[number], None if within is None else within[number])
    assert_spread(statistics.overall, values, within)
    expected = np.sqrt(values.var() + (0 if within is None else within.mean()))
    assert statistics.scaling_factor == pytest.approx(1 / expected, rel=1e-12)
    assert statistics.shift_factor == pytest.approx(values.mean(), rel=1e-12)
    assert statistics.positions == values.shape[1]


def assert_spread(spread, values, within):
    assert spread.mean == pytest.approx(values.mean(), rel=1e-12)
    assert spread.std == pytest.approx(values.std(), rel=1e-12)
    assert (spread.minimum, spread.maximum) == (values.min(), values.max())
    if within is None:
        assert spread.sample_std is None and spread.diffusion_std == spread.std
    else:
        assert spread.sample_std == pytest.approx(np.sqrt(values.var() + within.mean()), rel=1e-12)


def test_sampled_latents_divided_by_the_std_have_variance_one(tmp_path):
    made = write_store(tmp_path / "store")
    statistics = store_statistics(made.folder)
    mean, logvar = (torch.from_numpy(elements(made, name)) for name in ("mean", "logvar"))
    noise = torch.randn(200, *mean.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    samples = (mean + torch.exp(0.5 * logvar) * noise) * statistics.scaling_factor
    assert samples.std().item() == pytest.approx(1, abs=0.005)


def test_counts_buckets_and_reasons(tmp_path):
    made = write_store(tmp_path / "store")
    statistics = store_statistics(made.folder)
    assert statistics.is_complete and (statistics.units, statistics.planned_units) == (4, 4)
    assert statistics.counts.model_dump() == {"inputs": 19, "ok": 17, "error": 1, "skipped": 1, "rescued": 0}
    assert statistics.buckets == {"32x32": 10, "48x32": 6, "16x24": 1}
    assert statistics.reasons == {"cannot be decoded: truncated": 1, "NxN is smaller than NxN": 1}
    files = [path for path in made.folder.glob("shards/*/*") if path.suffix != ".json"]
    assert statistics.num_bytes == sum(path.stat().st_size for path in files)
    partial = write_store(tmp_path / "partial", complete=False, leave_out=[0])
    statistics = store_statistics(partial.folder)
    assert not statistics.is_complete and (statistics.units, statistics.planned_units) == (3, 4)


def test_the_table_and_the_json_say_it_all(tmp_path):
    statistics = store_statistics(write_store(tmp_path / "store").folder)
    console = Console(file=StringIO(), width=200)
    console.print(statistics.table())
    text = console.file.getvalue()
    for shown in ("complete; 19 inputs, 17 with latents", "48x32", "NxN is smaller than NxN", "std of samples"):
        assert shown in text
    assert f"{statistics.scaling_factor:.6g}" in text and f"{statistics.channels[1].mean:.5g}" in text
    values = json.loads(json.dumps(statistics.to_dict(), allow_nan=False))
    assert values["scaling_factor"] == statistics.scaling_factor
    assert values["channels"][1]["sample_std"] == statistics.channels[1].sample_std


def test_latents_without_a_scale(tmp_path):
    constant = {"a.png": {"mean": torch.ones(2, 16, 16)}}
    made = write_store(tmp_path / "one", store="mean", units=[("32x32", ["a.png"])], tensors=constant)
    with pytest.raises(UserError, match="constant ones: they have no scale"):
        _ = store_statistics(made.folder).scaling_factor
    assert "scaling_factor" not in store_statistics(made.folder).to_dict()
    made = write_store(tmp_path / "none", units=[("32x32", ["a.png"])], bad={"a.png": "error"})
    statistics = store_statistics(made.folder)
    assert statistics.overall is None and statistics.reasons == {"cannot be decoded: truncated": 1}
    Console(file=StringIO()).print(statistics.table())
    with pytest.raises(UserError, match="holds nothing yet"):
        store_statistics(write_store(tmp_path / "empty", complete=False, leave_out=[0, 1, 2, 3]).folder)


# --- into a model ----------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(tmp_path):
    """(statistics, model folder) of a model that nobody measured; keywords are fields of its config.json."""

    def make(name="model", **fields):
        vae = tiny_vae(**({"scaling_factor": 1.0, "shift_factor": None} | fields))
        folder = save_model(vae, tmp_path / name)
        channels = vae.config.latent_channels
        made = write_store(tmp_path / f"{name}-store", vae=load_autoencoder(folder), channels=channels)
        return store_statistics(made.folder), folder

    return make


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_the_scaling_factor_of_a_new_model_is_written(measured):
    statistics, folder = measured()
    before = config_of(folder)
    changed = write_measured(statistics, folder)
    assert changed == {"scaling_factor": pytest.approx(statistics.scaling_factor, rel=1e-5)}
    assert config_of(folder) == before | changed
    assert AutoencoderKL.from_pretrained(folder).config.scaling_factor == changed["scaling_factor"]
    assert write_measured(statistics, folder) == {}  # the same again: nothing to refuse


def test_a_family_with_a_shift_gets_one(measured):
    statistics, folder = measured(shift_factor=0.0)
    changed = write_measured(statistics, folder)
    assert set(changed) == {"scaling_factor", "shift_factor"}
    assert changed["shift_factor"] == pytest.approx(statistics.shift_factor, rel=1e-5)


def test_per_channel_statistics(measured):
    statistics, folder = measured(scaling_factor=0.18215)
    changed = write_measured(statistics, folder, per_channel=True)
    assert changed["scaling_factor"] == 1.0
    assert changed["latents_mean"] == pytest.approx([channel.mean for channel in statistics.channels], rel=1e-5)
    assert changed["latents_std"] == pytest.approx([channel.sample_std for channel in statistics.channels], rel=1e-5)
    with pytest.raises(UserError, match="latents_mean of 2 channels"):
        write_measured(statistics, folder)
    back = write_measured(statistics, folder, force=True)
    assert back["latents_mean"] is None and config_of(folder)["latents_std"] is None


@pytest.mark.parametrize(
    "fields", [{"scaling_factor": 0.13025}, {"scaling_factor": 1.0, "shift_factor": 0.1}], ids=["scale", "shift"]
)
def test_values_that_are_there_are_replaced_by_force_alone(measured, fields):
    statistics, folder = measured(**fields)
    before = config_of(folder)
    with pytest.raises(UserError, match=r"config\.json has values already .* pass --force to replace them"):
        write_measured(statistics, folder)
    assert config_of(folder) == before
    assert "scaling_factor" in write_measured(statistics, folder, force=True)


def test_the_figure_of_sd_is_a_default_in_a_model_that_cannot_be_sd(measured):
    """0.18215 is what diffusers writes where nobody measured, and what SD 1.x was trained with."""
    statistics, folder = measured(scaling_factor=0.18215)
    assert write_measured(statistics, folder)
    like_sd = {
        "latent_channels": 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 1,
        "norm_num_groups": 32,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    statistics, folder = measured("sd", scaling_factor=0.18215, **like_sd)
    with pytest.raises(UserError, match=r"scaling_factor 0\.18215"):
        write_measured(statistics, folder)


def test_another_model_and_another_class_are_refused(measured, tmp_path):
    statistics, _ = measured()
    other = save_model(tiny_vae(seed=1), tmp_path / "other")
    with pytest.raises(UserError, match="the encoder"):
        write_measured(statistics, other, force=True)
    with pytest.raises(UserError, match="is no diffusers folder on this machine"):
        write_measured(statistics, tmp_path / "nowhere")
    (tmp_path / "model" / "config.json").rename(tmp_path / "model" / "diffusion")
    with pytest.raises(UserError):
        write_measured(statistics, tmp_path / "model")


def test_a_name_that_is_no_folder_is_not_looked_for_on_the_hub(measured, monkeypatch):
    statistics, _ = measured()
    monkeypatch.setattr("latentvae.latents.operating.measured.load_autoencoder", None)
    with pytest.raises(UserError, match="owner/name is no diffusers folder on this machine"):
        write_measured(statistics, "owner/name")


def test_classes_without_a_scaling_factor_take_statistics_per_channel(tmp_path):
    """Of Qwen-Image and Wan: their pipelines read latents_mean and latents_std alone."""
    make_model("qwen-image").save_pretrained(tmp_path / "model")
    vae = load_autoencoder(tmp_path / "model")
    made = write_store(tmp_path / "store", vae=vae, channels=4)
    statistics = store_statistics(made.folder)
    with pytest.raises(UserError, match="has values already"):
        write_measured(statistics, tmp_path / "model", per_channel=True)
    changed = write_measured(statistics, tmp_path / "model", per_channel=True, force=True)
    assert set(changed) == {"latents_mean", "latents_std"}
    scaling = load_autoencoder(tmp_path / "model").scaling
    values = scaling.normalize(torch.from_numpy(elements(made, "mean")).float()[None, :, :, None])
    assert values.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    with pytest.raises(UserError, match=r"has no scaling_factor in its config\.json"):
        write_measured(statistics, tmp_path / "model", force=True)


def test_a_class_without_the_fields_is_refused(tmp_path):
    torch.manual_seed(0)
    blocks = dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), (8, 8))
    tiny = AutoencoderTiny(latent_channels=2, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1), **blocks)
    tiny.save_pretrained(tmp_path / "tiny")
    made = write_store(tmp_path / "store", vae=load_autoencoder(tmp_path / "tiny"), store="mean")
    with pytest.raises(UserError, match=r"AutoencoderTiny has no latents_mean in its config\.json"):
        write_measured(store_statistics(made.folder), tmp_path / "tiny", per_channel=True)
    changed = write_measured(store_statistics(made.folder), tmp_path / "tiny")
    assert AutoencoderTiny.from_pretrained(tmp_path / "tiny").config.scaling_factor == changed["scaling_factor"]
