"""The commands on a store that is there: verify, stats, gc, export, decode, info."""

import json
import re

import pytest

from latentvae import cli
from latentvae.autoencoders.adapter import load_autoencoder
from latentvae.checkpoint import save_model
from latentvae.latents.operating.statistics import store_statistics
from tests.latents.stores import contents, tiny_vae
from tests.latents.written import rewrite_unit, write_store


@pytest.fixture
def run(capsys):
    """Run a command; returns (exit code, what it printed, its error line)."""

    def _run(*arguments):
        try:
            cli.main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        printed = capsys.readouterr()
        lines = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        return code, printed.out, lines[0].removeprefix("error: ") if lines else ""

    return _run


@pytest.fixture
def made(tmp_path):
    save_model(tiny_vae(scaling_factor=1.0, shift_factor=None), tmp_path / "model")
    return write_store(tmp_path / "store", vae=load_autoencoder(tmp_path / "model"), dtype="fp16")


def flip_last_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_verify(run, made):
    code, out, _ = run("verify", made.folder, "--full")
    assert code == 0 and "whole; 4 units" in out
    shard = next(made.folder.glob("shards/*/u000002-*.safetensors"))
    flip_last_byte(shard)
    assert run("verify", made.folder)[0] == 0  # the numbers themselves are not read
    code, out, _ = run("verify", made.folder, "--full", "--drop-damaged")
    assert code == 1 and shard.name in out and "1 units were dropped: run the same encode again" in out
    code, out, _ = run("verify", made.folder)
    assert code == 1 and "1 of 4 units are not encoded yet" in out


def test_verify_mistakes(run, made, tmp_path):
    code, _, error = run("verify", made.folder, "--source", tmp_path)
    assert code == 2 and error == "--vae and --source are for --deep N"
    code, _, error = run("verify", made.folder, "--deep", "2")
    assert code == 2 and "has settings that this version of latentvae does not know" in error
    assert run("verify", tmp_path)[0] == 2


def test_stats(run, made, tmp_path):
    statistics = store_statistics(made.folder)
    code, out, _ = run("stats", made.folder)
    assert code == 0 and f"{statistics.scaling_factor:.6g}" in out and "48x32" in out
    code, out, _ = run("stats", made.folder, "--json")
    assert code == 0 and json.loads(out)["scaling_factor"] == statistics.scaling_factor
    code, out, _ = run("stats", made.folder, "--write-config", tmp_path / "model", "--json")
    assert code == 0 and json.loads(out)["counts"]["ok"] == 17
    written = json.loads((tmp_path / "model" / "config.json").read_text())["scaling_factor"]
    assert written == pytest.approx(statistics.scaling_factor, rel=1e-5)
    code, out, _ = run("stats", made.folder, "--write-config", tmp_path / "model")
    assert code == 0 and "nothing, the values are there" in out
    code, _, error = run("stats", made.folder, "--write-config", tmp_path / "model", "--per-channel")
    assert code == 2 and "pass --force" in error
    code, out, _ = run("stats", made.folder, "--write-config", tmp_path / "model", "--per-channel", "--force")
    assert code == 0 and re.search(r"written to .*latents_mean .*scaling_factor 1\.0", out)
    assert "run the same encode again" in out
    code, _, error = run("stats", made.folder, "--force")
    assert code == 2 and "are for --write-config DIR" in error


def test_gc(run, made):
    rewrite_unit(made, 0, {key: {n: t * 0.5 for n, t in made.tensors[key].items()} for key in made.units[0][:2]})
    before = contents(made.folder)
    code, out, _ = run("gc", made.folder, "--dry-run")
    assert code == 0 and "2 files would be removed" in out and contents(made.folder) == before
    code, out, _ = run("gc", made.folder)
    assert code == 0 and "2 files removed" in out and len(contents(made.folder)) == len(before) - 2


def test_export_serves_models_and_stores(run, made, tmp_path):
    code, out, _ = run(
        "export", made.folder, "--out", tmp_path / "tars", "--shard-images", "5", "--posterior", "sample"
    )
    assert code == 0 and "17 latents in 5 files (webdataset)" in out
    code, out, _ = run("export", made.folder, "--out", tmp_path / "tables", "--format", "parquet", "--normalize")
    assert code == 0 and (tmp_path / "tables" / "README.md").is_file()
    code, out, _ = run("export", tmp_path / "model", "--out", tmp_path / "shipped", "--dtype", "fp16")
    assert code == 0 and "loaded back with plain diffusers" in out


@pytest.mark.parametrize(
    "source, arguments, message",
    [
        ("model", ["--format", "parquet"], "is a model, and --format parquet is not for one: choose diffusers"),
        ("store", ["--format", "diffusers"], "is a store, and --format diffusers is not for one: choose webdataset, "),
        ("model", ["--shard-images", "5"], "is a model, and --shard-images is not for one"),
        ("model", ["--normalize"], "is a model, and --normalize is not for one"),
        ("store", ["--overwrite"], "is a store, and --overwrite is not for one"),
        ("store", ["--push-to-hub", "a/b"], "is a store, and --push-to-hub is not for one"),
        ("store", ["--dtype", "bf16"], "dtype is bf16; it must be one of fp16, fp32"),
        ("store", ["--captions", "source"], "source images does not exist"),
    ],
)
def test_export_refuses_what_does_not_fit_by_name(run, made, tmp_path, source, arguments, message):
    code, _, error = run("export", tmp_path / source, "--out", tmp_path / "out", *arguments)
    assert code == 2 and message in error and not (tmp_path / "out").exists()


def test_damaged_metrics_beside_a_model_are_one_line(run, made, tmp_path):
    (tmp_path / "model" / "metrics.json").write_text("{")
    code, _, error = run("export", tmp_path / "model", "--out", tmp_path / "out")
    assert code == 2 and "metrics.json cannot be read as JSON" in error and not (tmp_path / "out").exists()


def test_decode(run, made, tmp_path):
    code, out, _ = run("decode", made.folder, "--out", tmp_path / "pictures", "--limit", "3", "--device", "cpu")
    assert code == 0 and "3 of 17 latents decoded" in out
    assert len(list((tmp_path / "pictures").rglob("*.png"))) == 3


def test_info(run, made):
    code, out, _ = run("info", made.folder)
    assert code == 0
    for shown in (
        "latent store, complete",
        "19: 17 ok, 1 errors, 1 skipped",
        "4 committed, in 1 plan file",
        "mean and logvar in fp16, 2 channels, raw",
        "(raw - 0) * 1",
        "48x32 pixels => 24x16",
        made.manifest.fingerprint,
    ):
        assert shown in out


def test_a_store_behind_a_url_is_measured_decoded_and_handed_over(run, made, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = made.folder.as_uri()
    code, out, _ = run("stats", url, "--json")
    assert code == 0 and json.loads(out)["scaling_factor"] == store_statistics(made.folder).scaling_factor
    code, out, _ = run("export", url, "--out", tmp_path / "remote")
    assert code == 0
    run("export", made.folder, "--out", tmp_path / "local")
    assert contents(tmp_path / "remote") == contents(tmp_path / "local")
    assert run("decode", url, "--out", tmp_path / "pictures", "--limit", "1")[0] == 0


def test_export_of_a_store_that_is_not_complete(run, tmp_path):
    made = write_store(tmp_path / "store", complete=False, leave_out=[0])
    code, _, error = run("export", made.folder, "--out", tmp_path / "out")
    assert code == 2 and "is not complete (1 of 4 units are to be encoded)" in error
    code, out, _ = run("export", made.folder, "--out", tmp_path / "out", "--partial")
    assert code == 0 and "13 latents in" in out


def test_commands_run_in_one_process(run, made, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in ("verify", "stats", "gc"):
        code, _, error = run(command, made.folder)
        assert code == 2 and f"latentvae {command} runs in one process, and 2 were started" in error
