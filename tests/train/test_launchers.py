"""The launchers run as they stand: accelerate's configurations, and the SLURM job with stubs of srun and scontrol."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from latentvae.assembly import build
from latentvae.errors import UserError
from tests.training.process_runs import (
    GLOBAL_BATCH,
    WHOLE_STEP,
    end_family,
    largest_difference,
    newest,
    recipe_file,
    run,
    tensors_below,
)
from tests.training.recipes import tiny_recipe

TRAIN = Path(__file__).parents[2] / "train"
JOB, NODE = TRAIN / "slurm" / "train_multinode.sh", TRAIN / "torchrun_multinode.sh"
SCRIPTS = sorted(TRAIN.rglob("*.sh"))
CONFIGS = sorted((TRAIN / "accelerate").glob("*.yaml"))
needs_bash = pytest.mark.skipif(shutil.which("bash") is None or os.name == "nt", reason="no bash")

# Starts the command once for every node, passes signals on, and ends with the worst exit code, as srun does.
SRUN = """#!{python}
import os, signal, subprocess, sys
command = [argument for argument in sys.argv[1:] if not argument.startswith("--kill-on-bad-exit")]
nodes = os.environ["SLURM_JOB_NODELIST"].split(",")
tasks = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: [task.send_signal(number) for task in tasks])
tasks += [subprocess.Popen(command, env=os.environ | {{"NODE_ADDRESS": node}}) for node in nodes]
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then tr , '\\n' <<< "$3"; else echo "$@" >> "$STUB_FOLDER/asked"; fi
"""


@needs_bash
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_can_be_parsed_and_run(script):
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    assert script.read_text(encoding="utf-8").startswith("#!/bin/bash\n") and os.access(script, os.X_OK)
    if shutil.which("shellcheck"):
        found = subprocess.run(["shellcheck", "-S", "warning", script], capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout


@needs_bash
@pytest.mark.parametrize("script", [JOB, NODE], ids=lambda path: path.name)
def test_without_arguments_it_says_how_it_is_used(script):
    said = subprocess.run(["bash", script], capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == 2 and said.stderr.startswith("usage: ") and script.name in said.stderr


def test_what_slurm_reads_stands_before_the_first_command():
    """sbatch ignores what comes later."""
    lines = JOB.read_text(encoding="utf-8").splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH ")]
    assert len(options) >= 8 and max(options) < first_command
    said = {lines[number].removeprefix("#SBATCH --").partition("=")[::2] for number in options}
    assert {("signal", "B:USR1@180"), ("requeue", ""), ("ntasks-per-node", "1")} <= said


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_takes_every_field_and_the_recipe_decides_the_precision(file):
    from accelerate.commands.config.config_args import load_config_from_file

    written = yaml.safe_load(file.read_text(encoding="utf-8"))
    config = load_config_from_file(str(file))  # refuses a field that it does not know
    assert config.distributed_type == "MULTI_GPU" and config.mixed_precision == "no"
    assert config.num_machines == written["num_machines"] and config.num_processes == written["num_processes"]
    assert (config.num_machines > 1) == (file.stem == "multi_node")


@pytest.mark.multiprocess
def test_accelerate_launch_with_the_configuration_of_several_machines(photographs, tmp_path):
    """As written, but for two processes of this machine and no GPU."""
    file, recipe, out = tmp_path / "two.yaml", tmp_path / "recipe.yaml", tmp_path / "run"
    config = yaml.safe_load((TRAIN / "accelerate" / "multi_node.yaml").read_text(encoding="utf-8"))
    config |= {"distributed_type": "MULTI_CPU", "use_cpu": True, "num_processes": 2, "num_machines": 1}
    del config["gpu_ids"], config["main_process_ip"], config["main_process_port"]
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    recipe_file(recipe, photographs, *WHOLE_STEP)
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(file), "-m", "latentvae"]
    command = [sys.executable, *launcher, "train", "--recipe", str(recipe), "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"OMP_NUM_THREADS": "1", "CCL_WORKER_COUNT": "0"}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    one = run(1, photographs, tmp_path / "one", *WHOLE_STEP)
    assert largest_difference(tensors_below(newest(one)), tensors_below(newest(out))) < 1e-9


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "parallelism"),
    ],
)
def test_what_is_not_plain_ddp_is_refused_in_one_line(photographs, tmp_path, monkeypatch, variable, name):
    """`accelerate launch` says in the environment what it was configured for."""
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=f"{name}.* is not supported.*MULTI_GPU"):
        build(tiny_recipe(photographs), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@needs_bash
@pytest.mark.skipif(shutil.which("ip") is None or shutil.which("setsid") is None, reason="no ip, or no setsid")
@pytest.mark.parametrize(
    ("name", "resolved", "given", "local", "is_host"),
    [
        ("node0", "127.0.1.1", None, "192.0.2.7", "true"),  # Debian's name for the machine itself
        ("node0", "127.0.1.1", "198.51.100.7", "198.51.100.7", "true"),
        ("localhost", "127.0.0.1", None, "127.0.0.1", "true"),
        ("127.0.0.1", "127.0.0.1", "127.0.0.2", "127.0.0.2", "false"),
    ],
)
def test_the_rendezvous_lies_where_other_nodes_reach_it(tmp_path, name, resolved, given, local, is_host):
    """What torchrun is told where the name of this machine is one of loopback, which no other node reaches."""
    asked = tmp_path / "asked"
    stubs = {"getent": f"echo '{resolved} STREAM {name}'", "setsid": f'echo "$@" > {asked}'}
    stubs["hostname"] = "echo 192.0.2.7 198.51.100.7"
    for stub, line in stubs.items():
        (tmp_path / stub).write_text(f"#!/bin/bash\n{line}\n", encoding="utf-8")
        (tmp_path / stub).chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if key != "NODE_ADDRESS"}
    environment |= {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "NODES": "2", "MASTER": f"{name}:29400"}
    environment |= {"NODE_ADDRESS": given} if given else {}
    said = subprocess.run(["bash", NODE, "--out", "RUN"], env=environment, capture_output=True, timeout=60, check=False)
    assert said.returncode == 0, said.stderr
    command = asked.read_text()
    assert f"--local-addr {local} " in command and f"is_host={is_host}" in command, command


def start_job(folder, recipe, out, restarts=0):
    """The job's script as SLURM runs it on two nodes of one trainer, which are two addresses of this machine."""
    stubs = folder / "stubs"
    stubs.mkdir(exist_ok=True)
    for name, content in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (stubs / name).write_text(content, encoding="utf-8")
        (stubs / name).chmod(0o755)
    environment = os.environ | {
        "PATH": os.pathsep.join([str(stubs), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(TRAIN.parent),
        "STUB_FOLDER": str(stubs),
        "ACCELERATE_USE_CPU": "true",
        "SLURM_SUBMIT_DIR": str(TRAIN.parent),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "127.0.0.1,127.0.0.2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    script = shutil.copy(JOB, folder / "slurm_script")  # SLURM runs a copy
    with open(folder / "job.txt", "a", encoding="utf-8") as said:
        command = ["bash", script, "--recipe", recipe, "--out", out]
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=said)


@needs_bash
@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_slurm_job_saves_before_its_time_is_over_and_queues_itself_again(photographs, tmp_path):
    said, asked = tmp_path / "job.txt", tmp_path / "stubs" / "asked"
    out, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    settings = (*WHOLE_STEP, "training.log_every_images=12")
    long = (*settings, f"training.total_images={10_000 * GLOBAL_BATCH}")
    job = start_job(tmp_path, recipe_file(tmp_path / "long.yaml", photographs, *long), out)
    try:
        deadline = time.monotonic() + 200
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
            assert job.poll() is None and time.monotonic() < deadline, said.read_text()
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(100) == 0, said.read_text()
    finally:
        end_family(job.pid)
    assert asked.read_text().split() == ["requeue", str(os.getpid())]
    images = int(newest(out).name)
    assert images >= 2 * GLOBAL_BATCH and not (out / "model").exists()
    settings += (f"training.total_images={images + GLOBAL_BATCH}",)
    again = start_job(tmp_path, recipe_file(tmp_path / "rest.yaml", photographs, *settings), out, restarts=1)
    try:
        assert again.wait(200) == 0, said.read_text()
    finally:
        end_family(again.pid)
    text = said.read_text()
    assert "start 1: 2 nodes, 1 trainers on each, rendezvous at 127.0.0.1:" in text and "start 2: 2 nodes" in text
    assert f"finished after {images + GLOBAL_BATCH} images" in text and (out / "model").is_dir()
    assert len(asked.read_text().splitlines()) == 1, "a job that is done does not queue itself again"
