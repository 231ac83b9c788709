"""Killed at any instant, a run can be resumed, has lost no more than one checkpoint interval, and ends the same."""

import os
import random
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from latentvae.assembly import build
from latentvae.training import trainer as trainer_module
from tests.training.process_runs import FORK_SERVER, assert_bit_identical, newest, start, tensors_below
from tests.training.recipes import tiny_recipe

pytestmark = [pytest.mark.multiprocess, pytest.mark.skipif(os.name == "nt", reason="no SIGKILL, no forkserver")]
BATCH, INTERVAL, KILLS = 4, 12, 30
SETTINGS = (
    f"training.save_every_images={INTERVAL}",
    "training.validate_every_images=40",
    "training.log_every_images=4",
    "training.mixed_precision=no",
    "loss.discriminator_start=40",
    "loss.adversarial_start=80",
)


def train(source: Path, out: Path, settings: tuple[str, ...], reached: Any = None) -> None:
    """Train to the end; `reached` always tells how many images the weights have seen."""
    trainer = build(tiny_recipe(source, *settings), out, resume="auto", progress=False)
    update = trainer.updater.update

    def updated(batches: Any, images_seen: int, **options: Any) -> Any:
        result = update(batches, images_seen, **options)
        if reached is not None:
            reached.value = images_seen + BATCH
        return result

    setattr(trainer.updater, "update", updated)  # noqa: B010
    trainer.train()


def images_saved(out: Path) -> int:
    checkpoints = out / "checkpoints"
    return int(newest(out).name) if checkpoints.is_dir() and any(checkpoints.glob("0*")) else 0


@pytest.mark.slow
def test_thirty_kills_at_random_moments(photographs, tmp_path):
    """A run that ends before the last kill is followed by another one."""
    settings = (*SETTINGS, f"training.total_images={10 * INTERVAL}")
    straight, killed, reached = tmp_path / "straight", tmp_path / "killed", FORK_SERVER.Value("l", 0)
    start(tmp_path / "said", 1, train, photographs, straight, settings).require_success()
    moments, kills, losses, places, finished = random.Random(0), 0, [], [], 0
    while kills < KILLS or killed.exists():
        reached.value = before = images_saved(killed)
        launch = start(tmp_path / "said", 1, train, photographs, killed, settings, reached)
        (process,) = launch.processes
        while process.is_alive() and reached.value == before and moments.random() < 0.999:
            time.sleep(0.005)  # most live long enough to take a step, some die as they start
        process.join(moments.uniform(0, 0.8) if kills < KILLS else 200)
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
            saved = images_saved(killed)
            assert saved >= before, "a checkpoint was lost"
            losses.append(reached.value - saved)
            places.append((reached.value, len(list(killed.glob("checkpoints/.*")))))
            assert losses[-1] <= INTERVAL
            continue
        assert process.exitcode == 0, launch.errors()
        assert_bit_identical(tensors_below(newest(straight)), tensors_below(newest(killed)))
        assert_bit_identical(tensors_below(straight / "model"), tensors_below(killed / "model"))
        for file in ("config.json", "metrics.json"):
            assert (straight / "model" / file).read_text() == (killed / "model" / file).read_text()
        assert [path.name for path in killed.rglob(".*")] == []
        shutil.rmtree(killed)
        finished += 1
    print(f"{KILLS} kills in {finished} runs after {places}, images lost: {losses}")
    assert finished >= 1 and len({place for place, _ in places}) >= 8


class DiesAt:
    """Ends the process, without any clean-up, instead of its n-th change to the file system."""

    def __init__(self, number: int, said: Path) -> None:
        self.left, self.said = number, said

    def patch(self) -> None:
        for name in ("link", "rename", "replace", "unlink", "rmdir", "mkdir", "fsync"):
            setattr(os, name, partial(self._counted, getattr(os, name)))

    def _counted(self, function: Any, *arguments: Any, **options: Any) -> Any:
        if self.left == 0:
            self.said.write_text(function.__name__)
            os._exit(9)
        self.left -= 1
        return function(*arguments, **options)


def crash(source: Path, out: Path, settings: tuple[str, ...], number: int, said: Path) -> None:
    """Resume, and die before the n-th change to the disk from the next checkpoint on."""
    save = trainer_module.save_checkpoint

    def saved(*arguments: Any, **options: Any) -> None:
        DiesAt(number, said).patch()
        save(*arguments, **options)

    trainer_module.save_checkpoint = saved
    train(source, out, settings)


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 11])
def test_a_crash_between_any_two_changes_of_a_checkpoint(photographs, tmp_path, step):
    """From the first rename of the last checkpoint, the old ones' removal included, to the finished model."""
    settings = (
        *SETTINGS,
        "training.save_every_images=4",
        "training.keep_checkpoints=1",
        "data.num_workers=0",
        "loss.discriminator_start=0",
        "loss.adversarial_start=4",
    )
    straight, begun = tmp_path / "straight", tmp_path / "begun"
    build(tiny_recipe(photographs, *settings, "training.total_images=4"), begun, progress=False).train()
    shutil.rmtree(begun / "model")
    settings += ("training.total_images=8",)
    build(tiny_recipe(photographs, *settings), straight, progress=False).train()
    said, crashes, saved = tmp_path / "what", [], []
    for number in range(0, 1000, step):
        out = Path(shutil.copytree(begun, tmp_path / f"crash_{number}"))
        launch = start(tmp_path / "said", 1, crash, photographs, out, settings, number, said)
        (code,) = launch.end()
        if code == 0:
            break
        assert code == 9, launch.errors()
        crashes.append(said.read_text())
        saved.append(images_saved(out))
        assert saved[-1] in (4, 8)
        build(tiny_recipe(photographs, *settings), out, resume="auto", progress=False).train()
        where = f"after a crash before change {number}, a {crashes[-1]}"
        a, b = (tensors_below(folder / "checkpoints") | tensors_below(folder / "model") for folder in (straight, out))
        assert a.keys() == b.keys(), where
        assert_bit_identical(a, b)
        assert [path.name for path in out.rglob(".*")] == [], where
        shutil.rmtree(out)
    else:
        raise AssertionError("it never came to an end")
    print(f"{len(crashes)} crashes, {saved.count(4)} of them before the checkpoint was there")
    assert len(crashes) >= 40 // step and {4, 8} == set(saved)
