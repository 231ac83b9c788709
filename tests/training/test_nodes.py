"""Two nodes in two network namespaces of one machine: one dies and comes back, and the run ends as if undisturbed."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

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

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train" / "torchrun_multinode.sh"
ADDRESSES = ("10.77.31.1", "10.77.31.2")
STEPS = 48


def ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def nodes():
    """Names of two network namespaces that a virtual cable joins; skips where this cannot be had."""
    if shutil.which("ip") is None or shutil.which("bash") is None:
        pytest.skip("no iproute2, or no bash")
    names = [f"latentvae-{os.getpid()}-{index}" for index in range(2)]
    links = [f"lv{os.getpid() % 100000}{side}" for side in "ab"]
    try:
        for name in names:
            made = ip("netns", "add", name)
            if made.returncode != 0:
                pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
        cable = ip("link", "add", links[0], "netns", names[0], "type", "veth", "peer", links[1], "netns", names[1])
        if cable.returncode != 0:
            pytest.skip(f"network namespaces cannot be joined here: {cable.stderr.strip()}")
        for name, link, address in zip(names, links, ADDRESSES, strict=True):
            assert ip("-n", name, "addr", "add", f"{address}/24", "dev", link).returncode == 0
            for device in (link, "lo"):
                assert ip("-n", name, "link", "set", device, "up").returncode == 0
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


@contextlib.contextmanager
def launched(nodes, recipe, out):
    """The script on both nodes."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "NODES": "2",
        "GPUS": "1",
        "MASTER": f"{ADDRESSES[0]}:29411",
        "JOIN_SECONDS": "120",
    }
    started = []
    try:
        for number, node in enumerate(nodes):
            command = ["ip", "netns", "exec", node, "bash", SCRIPT, "--recipe", recipe, "--out", out]
            with open(said_by(out, number), "w", encoding="utf-8") as said:
                started.append(subprocess.Popen(command, env=environment, stdout=said, stderr=said))
        yield started
    finally:
        for process in started:
            end_family(process.pid)
            process.wait()


def said_by(out, number):
    return out.with_suffix(f".node{number}.txt")


def told(out):
    return "\n".join(f"node {number}: {said_by(out, number).read_text()[-6000:]}" for number in range(2))


def wait_for(condition, started, out, seconds=150):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and all(process.poll() is None for process in started), told(out)
        time.sleep(0.02)


def images_saved(out):
    folder = out / "checkpoints"
    return int(newest(out).name) if folder.is_dir() and any(folder.glob("[0-9]*")) else 0


def processes(node, word):
    """Of one node, those whose command has this word."""
    return [child for child in node.children(recursive=True) if word in child.cmdline()]


def settings(steps):
    return (
        *WHOLE_STEP,
        f"training.total_images={steps * GLOBAL_BATCH}",
        f"training.save_every_images={4 * GLOBAL_BATCH}",
        "training.keep_checkpoints=100",
        "data.num_workers=1",
    )


@pytest.mark.parametrize("victim", [1, 0], ids=["worker-node", "rendezvous-node"])
def test_a_node_that_dies_comes_back_and_the_run_ends_as_if_undisturbed(photographs, tmp_path, nodes, victim):
    out = tmp_path / "run"
    recipe = recipe_file(tmp_path / "recipe.yaml", photographs, *settings(STEPS))
    with launched(nodes, recipe, out) as started:
        wait_for(lambda: images_saved(out) >= 4 * GLOBAL_BATCH, started, out)
        node = psutil.Process(started[victim].pid)
        (agent,) = processes(node, "torch.distributed.run")
        before = {process.pid for process in processes(node, "latentvae")}
        assert len(before) >= 2 and agent.pid in before  # the agent's own line ends with the trainer's
        os.kill(agent.pid, signal.SIGKILL)
        saved = images_saved(out)
        assert saved < STEPS * GLOBAL_BATCH, "it was over before it could be disturbed"
        wait_for(lambda: images_saved(out) > saved + 4 * GLOBAL_BATCH, started, out)
        assert not [process for process in before if psutil.pid_exists(process)], "a trainer outlived its agent"
        codes = [process.wait(200) for process in started]
        assert codes == [0, 0], told(out)
    assert "the agent ended with 137: starting it again" in said_by(out, victim).read_text()
    if victim == 1:
        assert "starting it again" not in said_by(out, 0).read_text(), "the other node's agent did not live through it"
    undisturbed = run(1, photographs, tmp_path / "undisturbed", *settings(STEPS))
    names = [path.name for path in sorted((undisturbed / "checkpoints").iterdir())]
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == names and len(names) == STEPS // 4
    difference = largest_difference(*(tensors_below(newest(folder)) for folder in (undisturbed, out)))
    print(f"killed after {saved} of {STEPS * GLOBAL_BATCH} images, weights differ by {difference:.1e}")
    assert difference < 1e-9


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_node_ends_both_with_a_checkpoint(photographs, tmp_path, nodes, sent):
    out = tmp_path / "run"
    recipe = recipe_file(tmp_path / "recipe.yaml", photographs, *settings(1_000_000))
    with launched(nodes, recipe, out) as started:
        wait_for(lambda: images_saved(out) >= 4 * GLOBAL_BATCH, started, out)
        os.kill(started[1].pid, sent)
        codes = [process.wait(100) for process in started]
    assert codes == [0, 0], told(out)
    assert f"{signal.Signals(sent).name} after" in told(out) or "a signal after" in told(out)
