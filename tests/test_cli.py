"""The command line: fast help, one-line errors with exit code 2, and the commands that need no training."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer

from latentvae import cli
from latentvae.errors import UserError

COMMANDS = ["convert", "decode", "demo", "encode", "export", "gc", "info", "recipes", "stats", "train", "verify"]


def run(*arguments: str) -> int:
    """The exit code of one command, in this process."""
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as stopped:
        return int(stopped.code or 0)
    return 0


@pytest.fixture
def fails(capsys):
    """A function that runs a command which must fail as a user's mistake; returns its one line."""

    def _fails(*arguments: str) -> str:
        assert run(*arguments) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len([line for line in lines if line.startswith("error: ")]) == 1, lines
        assert lines[-1].startswith("error: ")
        return lines[-1].removeprefix("error: ")

    return _fails


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    from latentvae.checkpoint import save_model
    from latentvae.model.autoencoder import AutoencoderKL

    torch.manual_seed(0)
    return save_model(AutoencoderKL.from_preset("f8c4-tiny"), tmp_path_factory.mktemp("cli") / "model")


def test_help_answers_at_once():
    def seconds() -> float:
        began = time.perf_counter()
        result = subprocess.run(
            [sys.executable, "-m", "latentvae", "--help"], capture_output=True, text=True, check=True
        )
        assert all(re.search(rf"^  {command} ", result.stdout, re.MULTILINE) for command in COMMANDS)
        return time.perf_counter() - began

    assert min(seconds() for _ in range(3)) < 0.5


def test_commands_are_those_that_work():
    assert sorted(typer.main.get_command(cli.app).commands) == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_explains_itself(command, capsys):
    assert run(command, "--help") == 0
    assert capsys.readouterr().out
    for parameter in typer.main.get_command(cli.app).commands[command].params:
        assert parameter.help, f"{command} {parameter.name} has no help"


def test_defaults_told_by_encode_are_those_of_the_config():
    from latentvae.images import DecodePolicy, PixelFormat
    from latentvae.latents.encoding.settings import DEFAULT_RESOLUTION, EncodeConfig

    told = {}
    for parameter in typer.main.get_command(cli.app).commands["encode"].params:
        match = re.search(r"\[default: ([\w. ]+)\]", parameter.help or "")
        if match:
            told[parameter.name] = match[1]
    config, policy = EncodeConfig(), DecodePolicy()
    in_words = {
        "resolution": str(DEFAULT_RESOLUTION),
        "device": "a GPU where there is one",
        "image_column": "the one that holds images",
        "pixel_dtype": PixelFormat().dtype,
        "pixel_range": "all of the integer type",
        "background": " ".join(map(str, policy.background)),
        "animation": policy.animation,
        "max_pixels": str(policy.max_pixels),
        "icc": policy.icc,
        "ray_actors": "one per GPU",
    }
    assert set(told) >= {"batch_size", "unit_images", "dtype", "precision", "small", "filter", "seed", "engine"}
    assert told == {name: in_words.get(name) or str(getattr(config, name)) for name in told}


def test_every_setting_of_an_encoding_is_an_option():
    from latentvae.images import DecodePolicy
    from latentvae.latents.encoding.encode import EncodeConfig

    options = {parameter.name for parameter in typer.main.get_command(cli.app).commands["encode"].params}
    nested = set(DecodePolicy.model_fields) | {"pixel_dtype", "pixel_range"}
    assert options == (set(EncodeConfig.model_fields) - {"policy", "pixels"}) | nested | {
        "source", "vae", "out", "dry_run",
    }  # fmt: skip


def test_a_user_error_is_one_line_and_exit_2(monkeypatch, fails):
    def broken(*_, **__):
        raise UserError("first\nsecond")

    monkeypatch.setattr("latentvae.info.describe_path", broken)
    assert fails("info", "somewhere") == "first second"


def test_a_bug_keeps_its_traceback_and_exits_1():
    code = "import latentvae.info, latentvae.cli; latentvae.info.describe_path = lambda p: 1 / 0; latentvae.cli.main()"
    result = subprocess.run([sys.executable, "-c", code, "info", "x"], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert "ZeroDivisionError" in result.stderr


def test_unknown_commands_and_options_exit_2(capsys):
    assert run("trane") == 2
    assert run("train", "--recipes", "x") == 2
    assert "--recipe" in capsys.readouterr().err


def test_log_lines_go_to_the_stderr_of_the_moment(monkeypatch):
    """A progress bar puts itself in its place, and prints them above itself."""
    import io
    import logging

    shown = io.StringIO()

    def speaks(*_):
        monkeypatch.setattr(sys, "stderr", shown)
        logging.getLogger("latentvae").info("above the bar")
        return {}

    monkeypatch.setattr("latentvae.info.describe_path", speaks)
    run("info", "somewhere")
    assert "above the bar" in shown.getvalue()


def test_train_script_takes_the_arguments_of_the_command(photographs, tmp_path):
    script = Path(__file__).parents[1] / "train" / "train.py"
    arguments = ["--recipe", "smoke_cpu", "--set", f"data.source={photographs}", "--dry-run"]
    command = [sys.executable, script, *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(photographs) in result.stdout and "parameters" in result.stdout


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.startswith("latentvae 0.")


# --- mistakes that the user can mend ---------------------------------------------------------------------------------


def test_unknown_recipe_key_has_a_suggestion(fails):
    text = fails("train", "--recipe", "smoke_cpu", "--set", "training.learning_rat=1", "--dry-run")
    assert "unknown key training.learning_rat; did you mean training.learning_rate?" in text


def test_unknown_recipe(fails):
    assert "smoke_cpu" in fails("train", "--recipe", "smoke", "--dry-run")
    assert "smoke_cpu" in fails("recipes", "smoke")


def test_folder_without_images(fails, tmp_path, model_folder):
    (tmp_path / "empty").mkdir()
    source = f"data.source={tmp_path / 'empty'}"
    assert str(tmp_path / "empty") in fails(
        "train", "--recipe", "smoke_cpu", "--set", source, "--out", tmp_path / "run"
    )
    assert str(tmp_path / "empty") in fails(
        "encode", tmp_path / "empty", "--vae", model_folder, "--out", tmp_path / "s"
    )
    absent = tmp_path / "absent"
    assert str(absent) in fails("encode", absent, "--vae", model_folder, "--out", tmp_path / "t")


def test_size_that_is_no_multiple(fails, tmp_path, photographs, model_folder):
    assert "takes multiples of 8: 56 and 64 would do" in fails(
        "encode", photographs, "--vae", model_folder, "--out", tmp_path / "store", "--resolution", "60"
    )
    options = ("--set", f"data.source={photographs}", "--set", "data.resolution=60", "--out", tmp_path / "run")
    assert "multiple of 8" in fails("train", "--recipe", "smoke_cpu", *options)


def test_missing_model_or_checkpoint(fails, tmp_path, photographs):
    absent = tmp_path / "absent"
    assert str(absent) in fails("encode", photographs, "--vae", absent, "--out", tmp_path / "store")
    assert str(absent) in fails("export", absent, "--out", tmp_path / "exported")
    options = ("--set", f"data.source={photographs}", "--out", tmp_path / "run", "--resume", absent)
    assert str(absent) in fails("train", "--recipe", "smoke_cpu", *options)


def test_unwritable_output(fails, tmp_path, photographs, model_folder):
    blocked = tmp_path / "file"
    blocked.write_text("a file, where a folder is wanted")
    out = blocked / "out"
    sources = ("--set", f"data.source={photographs}", "--set", f"validation.source={photographs}")
    assert str(blocked) in fails("encode", photographs, "--vae", model_folder, "--out", out)
    assert str(blocked) in fails("train", "--recipe", "smoke_cpu", *sources, "--out", out)
    assert str(blocked) in fails("export", model_folder, "--out", out)


def test_not_a_store(fails, tmp_path):
    for arguments in (("verify", tmp_path), ("decode", tmp_path, "--out", tmp_path / "out")):
        assert str(tmp_path) in fails(*arguments)


def test_one_process_only_where_it_is_so(fails, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in fails("decode", tmp_path, "--out", tmp_path / "out")


# --- commands that work ----------------------------------------------------------------------------------------------


def test_recipes_lists_shows_and_copies(capsys, tmp_path, fails):
    assert run("recipes") == 0
    assert "smoke_cpu" in capsys.readouterr().out
    assert run("recipes", "smoke_cpu") == 0
    text = capsys.readouterr().out
    assert run("recipes", "smoke_cpu", "--copy", tmp_path / "mine.yaml") == 0
    assert (tmp_path / "mine.yaml").read_text(encoding="utf-8") == text
    capsys.readouterr()
    assert "exists already" in fails("recipes", "smoke_cpu", "--copy", tmp_path / "mine.yaml")
    (tmp_path / "file").write_text("")
    assert "cannot write" in fails("recipes", "smoke_cpu", "--copy", tmp_path / "file" / "mine.yaml")
    assert "name of a recipe" in fails("recipes", "--copy", tmp_path / "other.yaml")


def test_dry_run_does_nothing_but_tell(capsys, tmp_path, photographs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert run("train", "--recipe", "smoke_cpu", "--set", f"data.source={photographs}", "--dry-run") == 0
    assert "learning_rate" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before


def test_dry_run_knows_which_images_are_held_out(capsys, photographs, fails):
    arguments = ["train", "--recipe", "smoke_cpu", "--set", f"data.source={photographs}", "--dry-run"]
    assert run(*arguments, "--set", "validation.fraction=0") == 0
    assert "12 an epoch" in capsys.readouterr().out
    assert run(*arguments, "--set", "validation.fraction=0.5") == 0
    assert "12 an epoch" not in capsys.readouterr().out
    assert "nowhere" in fails(*arguments, "--set", "validation.source=nowhere")


def test_encode_verify_info_decode_export(capsys, tmp_path, photographs, model_folder):
    store, decoded, exported = tmp_path / "store", tmp_path / "decoded", tmp_path / "exported"
    options = ("--resolution", "64", "--num-workers", "0", "--batch-size", "4", "--device", "cpu")
    assert run("encode", photographs, "--vae", model_folder, "--out", store, *options) == 0
    assert "12 of 12 images" in capsys.readouterr().out
    assert run("verify", store) == 0
    assert run("decode", store, "--out", decoded, "--limit", "3") == 0
    assert len(list(decoded.rglob("*.png"))) == 3
    assert run("export", model_folder, "--out", exported, "--dtype", "fp16") == 0
    capsys.readouterr()
    assert run("info", store) == 0
    told = capsys.readouterr().out
    assert "latent store, complete" in told
    assert "12 ok" in told
    assert run("info", exported) == 0
    told = capsys.readouterr().out
    assert "AutoencoderKL" in told
    assert "float16" in told
    assert re.search(r"downsample factor +8\n", told)


def test_encode_passes_every_option_on(monkeypatch, tmp_path, capsys):
    """What the function that does the work gets; what is not passed keeps the default of the config."""
    from latentvae.latents.encoding.settings import EncodeConfig, resolved_config

    passed = {}

    def record(source, vae, out, **options):
        passed.update(options, source=source, vae=vae, out=out)
        return type("Report", (), {"counts": type("Counts", (), {"error": 1}), "__str__": lambda self: "the report"})()

    monkeypatch.setattr("latentvae.latents.encoding.encode.encode_dataset", record)
    assert run("encode", "images", "--vae", "model", "--out", tmp_path) == 0
    assert capsys.readouterr().out == "the report\n"
    config = resolved_config(None, {name: passed[name] for name in EncodeConfig.model_fields if name in passed})
    assert config == EncodeConfig() and (passed["source"], passed["vae"]) == ("images", "model")

    options = {
        "buckets": "sdxl", "small": "keep", "filter": "lanczos", "store": "auto", "dtype": "bf16", "precision": "fp16",
        "seed": 3, "batch_size": "auto", "unit_images": 7, "num_workers": 0, "device": "cpu", "lease_seconds": 20.0,
        "split": "train", "image_column": "picture", "key_column": "name", "subfolder": "vae", "revision": "main",
        "variant": "fp16", "engine": "ray", "ray_address": "auto", "ray_actors": 2,
    }  # fmt: skip
    given = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    flags = ["--hflip", "--retry-errors", "--streaming", "--strict"]
    pixels = ["--pixel-dtype", "float32", "--pixel-range", "0", "1"]
    policy = ["--background", "0", "1", "2", "--animation", "refuse", "--max-pixels", "99", "--icc", "ignore"]
    assert run("encode", "images", "--vae", "model", "--out", tmp_path, *given, *flags, *pixels, *policy) == 1
    config = resolved_config(None, {name: passed[name] for name in EncodeConfig.model_fields if name in passed})
    assert {name: getattr(config, name) for name in options} == options
    assert config.hflip and config.retry_errors and config.streaming
    assert config.pixels.dtype == "float32" and config.pixels.range == (0.0, 1.0)
    assert config.policy.model_dump() == {
        "background": (0, 1, 2), "animation": "refuse", "max_pixels": 99, "icc": "ignore"
    }  # fmt: skip
    assert resolved_config(None, {"batch_size": "24"}).batch_size == 24


def test_encode_tells_its_plan_and_writes_nothing(capsys, tmp_path, photographs, model_folder, fails):
    arguments = ("encode", photographs, "--vae", model_folder, "--resolution", "64", "--num-workers", "0")
    before = sorted(tmp_path.rglob("*"))
    assert run(*arguments, "--dry-run", "--batch-size", "2", "--device", "cpu") == 0
    told = capsys.readouterr().out
    assert "12 images in 1 units" in " ".join(told.split()) and "64x64" in told and "images/s" in told
    assert run(*arguments, "--dry-run", "--out", tmp_path / "store", "--device", "cpu") == 0
    assert sorted(tmp_path.rglob("*")) == before
    assert "give --out" in fails(*arguments)


def test_encode_strict_tells_the_report_and_exits_1(capsys, tmp_path, photographs, model_folder):
    (photographs / "claim.png").write_bytes(b"no image")
    options = ("--resolution", "64", "--num-workers", "0", "--device", "cpu")
    arguments = ("encode", photographs, "--vae", model_folder, "--out", tmp_path / "store", *options)
    assert run(*arguments) == 0
    assert run(*arguments, "--strict") == 1
    assert "12 of 13 images encoded, 1 errors" in capsys.readouterr().out
    (photographs / "claim.png").unlink()


def test_a_store_remembers_how_its_vae_was_loaded(tmp_path, photographs, model_folder, capsys):
    """So that `decode` needs no --vae."""
    import shutil

    from latentvae.latents.store.files import LatentStore

    shutil.copytree(model_folder, tmp_path / "pipeline" / "vae")
    options = ("--subfolder", "vae", "--resolution", "64", "--num-workers", "0", "--device", "cpu")
    store = tmp_path / "store"
    assert run("encode", photographs, "--vae", tmp_path / "pipeline", "--out", store, *options) == 0
    vae = LatentStore(store).read_manifest().vae
    assert (vae.name, vae.subfolder, vae.revision) == (str(tmp_path / "pipeline"), "vae", None)
    assert run("decode", store, "--out", tmp_path / "out", "--limit", "1") == 0


def test_other_kinds_of_pixels_take_the_channels_of_the_model(tmp_path, capsys):
    import numpy as np

    from latentvae.checkpoint import save_model
    from latentvae.images import PixelFormat
    from latentvae.latents.store.files import LatentStore
    from latentvae.model.autoencoder import AutoencoderKL

    folder = save_model(AutoencoderKL.from_preset("f8c4-tiny", in_channels=5, out_channels=5), tmp_path / "five")
    (tmp_path / "bands").mkdir()
    for index in range(3):
        np.save(tmp_path / "bands" / f"{index}.npy", np.full((64, 64, 5), 1000 * index, np.uint16))
    options = ("--pixel-dtype", "uint16", "--resolution", "64", "--num-workers", "0", "--device", "cpu")
    assert run("encode", tmp_path / "bands", "--vae", folder, "--out", tmp_path / "store", *options) == 0
    assert "3 of 3 images encoded" in capsys.readouterr().out
    fields = LatentStore(tmp_path / "store").read_manifest().fields["pixels"]
    assert PixelFormat(channels=5, dtype="uint16").channels == fields["channels"] and fields["dtype"] == "uint16"


@pytest.mark.multiprocess
def test_encode_runs_in_several_processes_and_one_tells_the_report(tmp_path, photographs, model_folder):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = ["--resolution", "64", "--num-workers", "0", "--unit-images", "2", "--batch-size", "2", "--store", "auto"]
    command = ["-m", "latentvae", "encode", photographs, "--vae", model_folder, "--out", tmp_path / "store", *options]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launcher, *map(str, command)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("12 of 12 images encoded") == 1
    assert result.stderr.count("posterior std") == 1
    assert run("verify", tmp_path / "store") == 0


def test_info_counts_parameters(capsys, model_folder, fails, tmp_path):
    from latentvae.checkpoint import load_model

    count = sum(parameter.numel() for parameter in load_model(model_folder).parameters())
    assert run("info", model_folder) == 0
    assert f"{count:,} in" in capsys.readouterr().out
    (file,) = Path(model_folder).glob("*.safetensors")
    assert run("info", file) == 0
    assert f"{count:,} in" in capsys.readouterr().out
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\xff" * 64)
    assert "not a readable safetensors file" in fails("info", broken)
    for header in (b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b"[" * 100_000):
        broken.write_bytes(len(header).to_bytes(8, "little") + header)
        assert "not a readable safetensors file" in fails("info", broken)
    assert "nothing at" in fails("info", tmp_path / "absent")
    (tmp_path / "folder").mkdir()
    assert "is no model" in fails("info", tmp_path / "folder")
    (tmp_path / "folder" / "config.json").write_text(json.dumps([1]))
    assert "JSON object" in fails("info", tmp_path / "folder")
