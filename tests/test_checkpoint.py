"""Model folders: atomic, strict, and recognised by hash; every mistake of the user is one line."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from latentvae import checkpoint
from latentvae.checkpoint import load_model, model_hashes, save_model
from latentvae.errors import UserError
from latentvae.model.autoencoder import AutoencoderKL

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return AutoencoderKL.from_preset("f4c3-tiny").eval()


@pytest.fixture
def folder(vae, tmp_path):
    return save_model(vae, tmp_path / "model", files={"README.md": "# größe\n"})


def refused(message, call, *args, **kwargs):
    with pytest.raises(UserError, match=message) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_round_trip(vae, folder):
    loaded = load_model(folder)
    assert type(loaded) is AutoencoderKL and not loaded.training
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), vae.parameters(), strict=True))
    assert (folder / "README.md").read_text(encoding="utf-8") == "# größe\n"
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", WEIGHTS]
    diffusers.AutoencoderKL.from_pretrained(folder)
    assert load_model(str(folder), torch_dtype=torch.float16).dtype == torch.float16


def test_a_loaded_model_keeps_no_file_mapped(folder):
    """Otherwise Windows could not replace or delete the folder while the model lives."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc/self/maps here")
    loaded = [load_model(folder), load_model(folder / WEIGHTS)]
    assert str(folder) not in maps.read_text()
    for vae in loaded:
        vae(torch.zeros(1, 3, 8, 8)).sample.sum().backward()
        torch.optim.SGD(vae.parameters(), lr=0.1).step()  # their own memory, and writable


def test_existing_folder_is_kept_unless_overwritten(vae, folder):
    refused("exists already", save_model, vae, folder)
    assert (folder / "README.md").exists()
    save_model(vae, folder, overwrite=True)
    assert not (folder / "README.md").exists() and load_model(folder)


def test_only_models_and_empty_folders_are_overwritten(vae, folder, tmp_path):
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    save_model(vae, photographs, overwrite=True)
    (photographs / "config.json").rename(photographs / "image.json")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(folder)
    for name in ("photographs", "file", "link"):
        refused("not overwritten", save_model, vae, tmp_path / name, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "model", "photographs"]
    assert (photographs / "image.json").exists()


def test_a_group_may_read_what_the_umask_lets_it(vae, tmp_path):
    modes = set()
    previous = os.umask(0o027)
    try:
        modes = {file.stat().st_mode & 0o777 for file in save_model(vae, tmp_path / "model").iterdir()}
    finally:
        os.umask(previous)
    assert modes == {0o640}


def test_a_full_disk_is_one_line(vae, tmp_path):
    """A limit on the size of files stands in for it: safetensors reports both as its own error, not as an OSError."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        refused("cannot write the model to .*File too large", save_model, vae, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_folder(vae, folder, monkeypatch):
    def crash(*args, **kwargs):
        raise RuntimeError("disk on fire")

    before = model_hashes(vae)
    monkeypatch.setattr(AutoencoderKL, "save_pretrained", crash)
    with pytest.raises(RuntimeError, match="disk on fire"):
        save_model(vae, folder, overwrite=True)
    assert model_hashes(load_model(folder)) == before
    assert [entry.name for entry in folder.parent.iterdir()] == ["model"]


def test_unwritable_output(vae, tmp_path):
    (tmp_path / "file").touch()
    refused("cannot write the model to", save_model, vae, tmp_path / "file" / "model")


def test_adapters_are_refused(vae, tmp_path):
    vae.add_adapter(LoraConfig(r=2, target_modules=["conv_out"]))
    refused("adapter", save_model, vae, tmp_path / "model")


def test_subfolder_and_hints(folder, tmp_path):
    pipeline = tmp_path / "pipeline"
    shutil.copytree(folder, pipeline / "vae")
    assert load_model(pipeline, subfolder="vae")
    refused(r"there is one in .*vae: give that", load_model, pipeline)
    run = tmp_path / "run"
    shutil.copytree(folder, run / "model")
    refused(r"there is one in .*model: give that", load_model, run)
    refused(r"there is one in .*vae: give that", load_model, pipeline, subfolder="unet")
    (tmp_path / "empty").mkdir()
    refused("has no config.json", load_model, tmp_path / "empty")


def test_what_is_not_a_model(folder, tmp_path):
    refused("no model at", load_model, tmp_path / "absent")
    refused("no model at", load_model, tmp_path / "absent.safetensors")
    refused("no model at", load_model, "absent")
    refused("is not a model", load_model, folder / "config.json")
    refused("has no weights", load_model, _without_weights(folder, tmp_path / "empty"))
    refused("a revision is for hub ids", load_model, folder, revision="main")
    refused("do not apply", load_model, folder / WEIGHTS, subfolder="vae")
    refused("fp16", load_model, folder, variant="fp16")


def test_pickles_are_refused(folder, tmp_path):
    pickled = _without_weights(folder, tmp_path / "pickled")
    torch.save({}, pickled / "diffusion_pytorch_model.bin")
    refused("only diffusion_pytorch_model.bin, a pickle", load_model, pickled)
    refused("is a pickle", load_model, pickled / "diffusion_pytorch_model.bin")
    torch.save({}, tmp_path / "vae.ckpt")
    refused("is a pickle", load_model, tmp_path / "vae.ckpt")


def _without_weights(folder, target):
    shutil.copytree(folder, target)
    (target / WEIGHTS).unlink()
    return target


def test_damaged_folders(folder, tmp_path):
    def damaged(name):
        shutil.copytree(folder, tmp_path / name)
        return tmp_path / name

    truncated = damaged("truncated")
    (truncated / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:2000])
    refused("cannot be loaded", load_model, truncated)
    config = damaged("config")
    (config / "config.json").write_text("{")
    refused("not a valid JSON", load_model, config)
    (config / "config.json").write_text("[]")
    refused("holds no fields", load_model, config)
    fields = json.loads((folder / "config.json").read_text())
    (config / "config.json").write_text(json.dumps(fields | {"block_out_channels": None}))
    refused("block_out_channels is None", load_model, config)
    (config / "config.json").write_text(json.dumps(fields | {"latent_channels": 5}))
    refused("expected shape", load_model, config)
    sharded = damaged("sharded")
    (sharded / WEIGHTS).unlink()
    load_model(folder).save_pretrained(sharded, max_shard_size="50KB")
    next(sharded.glob("*-00002-of-*.safetensors")).unlink()
    refused("00002-of-.* required", load_model, sharded)
    for name, change in {"lacks": lambda w: w.popitem(), "should not": lambda w: w.update(extra=torch.ones(1))}.items():
        other, weights = damaged(name), load_file(folder / WEIGHTS)
        change(weights)
        save_file(weights, other / WEIGHTS, metadata={"format": "pt"})
        refused(name, load_model, other)


def test_another_class_and_unknown_fields(folder, tmp_path, caplog):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderTiny"}))
    refused("AutoencoderTiny: only AutoencoderKL", load_model, folder)
    (folder / "config.json").write_text(json.dumps(config | {"new_field": 1}))
    load_model(folder)
    assert "new_field" in caplog.text


def test_hub_id_offline_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "_hub_is_reachable", lambda: False)
    monkeypatch.chdir(tmp_path)
    refused("neither a folder here nor in the hub's local cache", load_model, "nobody-here/no-such-vae")


def test_single_file_without_configuration_offline(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_hub_is_reachable", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    shutil.copy(folder / WEIGHTS, tmp_path / "alone.safetensors")
    refused("put the model's config.json beside it", load_model, tmp_path / "alone.safetensors")


@pytest.mark.parametrize("answer, expected", [(None, False), (503, False), (200, True), (404, True)])
def test_an_unreachable_hub_is_noticed_quickly(monkeypatch, answer, expected):
    """503 is a proxy without the hub behind it; a mirror may have no page at its root."""

    class Session:
        def head(self, url, timeout):
            assert timeout <= 3
            if answer is None:
                raise TimeoutError
            return SimpleNamespace(status_code=answer)

    monkeypatch.setattr(checkpoint, "get_session", Session)
    assert checkpoint._hub_is_reachable() == expected


def test_hashes_do_not_depend_on_storage(vae, tmp_path):
    expected = model_hashes(vae)
    vae.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert model_hashes(load_model(tmp_path / "shards")) == expected
    assert model_hashes(vae.to(memory_format=torch.channels_last)) == expected
    plain = diffusers.AutoencoderKL.from_pretrained(tmp_path / "shards")
    assert model_hashes(AutoencoderKL.from_diffusers(plain)) == expected


def test_hashes_change_with_what_they_stand_for(vae):
    before = model_hashes(vae)
    assert len({before.encoder, before.decoder, before.model}) == 3

    def changed():
        after = model_hashes(vae)
        return [before.encoder != after.encoder, before.decoder != after.decoder, before.model != after.model]

    vae.register_to_config(scaling_factor=0.5)
    assert changed() == [False, False, True]
    vae.register_to_config(scaling_factor=1.0, sample_size=512, force_upcast=False, act_fn="swish")
    assert changed() == [False, False, False]
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] += 1e-3
        assert changed() == [False, True, True]
        vae.quant_conv.bias[0] += 1e-3
    assert changed() == [True, True, True]
    vae.half()
    assert model_hashes(vae).encoder != model_hashes(vae.float()).encoder  # the same numbers in another dtype
