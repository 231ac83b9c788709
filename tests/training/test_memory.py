"""The largest micro-batch that fits, with a made-up device and on this one."""

import threading
import time

import psutil
import pytest
import torch

from latentvae.errors import UserError
from latentvae.training import memory
from latentvae.training.memory import PeakMemory, largest_micro_batch, largest_within, optimizer_bytes_to_come
from latentvae.training.optim import make_optimizer
from tests.training.updaters import make_updater, moved, run, weights

GIB = 2**30


class Gpu:
    """A GPU of 16 GiB on which an image takes one."""

    def __init__(self, monkeypatch):
        self.tried, self.peak = [], 0
        for name, function in {
            "empty_cache": lambda: None,
            "mem_get_info": lambda device: (14 * GIB, 16 * GIB),
            "memory_reserved": lambda device: 2 * GIB,
            "reset_peak_memory_stats": lambda device: None,
            "synchronize": lambda device: None,
            "max_memory_allocated": lambda device: self.peak,
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def __call__(self, size):
        self.tried.append(size)
        if size > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.peak = size * GIB


@pytest.mark.parametrize(
    ("per_process", "to_come", "expected", "tried"),
    [
        (48, 0, 12, [1, 2, 3, 4, 6, 8, 12, 16]),  # 16 take more than 90 percent
        (40, 0, 10, [1, 2, 4, 5, 8, 10, 20]),  # 20 run out of memory
        (12, 0, 12, [1, 2, 3, 4, 6, 12]),
        (48, 4 * GIB, 8, [1, 2, 3, 4, 6, 8, 12]),  # the optimizer will take a quarter
        (7, 0, 7, [1, 7]),
        (1, 0, 1, [1]),
    ],
)
def test_a_gpu_is_tried_upwards_through_the_divisors(monkeypatch, per_process, to_come, expected, tried):
    gpu = Gpu(monkeypatch)
    assert largest_micro_batch(gpu, per_process, torch.device("cuda"), to_come=to_come) == expected
    assert gpu.tried == tried


def test_all_processes_take_the_smallest_answer_of_any(monkeypatch):
    Gpu(monkeypatch)
    monkeypatch.setattr(memory, "gather_object", lambda values: [*values, 3])
    assert largest_micro_batch(lambda size: None, 12, torch.device("cuda")) == 3
    monkeypatch.setattr(memory, "gather_object", lambda values: [*values, 0])
    with pytest.raises(UserError, match="not even one image fits"):
        largest_micro_batch(lambda size: None, 12, torch.device("cuda"))


def test_the_need_of_more_images_lies_on_a_line():
    sizes = [1, 2, 4, 8, 16]
    assert largest_within(1000.0, 100.0, 150.0, sizes) == 16  # 100 + 15 * 50
    assert largest_within(849.0, 100.0, 150.0, sizes) == 8
    assert largest_within(99.0, 100.0, 150.0, sizes) == 0
    assert largest_within(500.0, 100.0, 100.0, sizes) == 16  # 25 each at least
    assert largest_within(450.0, 100.0, 100.0, sizes) == 8


@pytest.mark.skipif(not memory.PROC.exists(), reason="only Linux keeps the highest mark of a process's memory")
def test_a_peak_is_seen_however_short_it_is(monkeypatch):
    monkeypatch.setattr(PeakMemory, "_watch", lambda self: pytest.fail("the mark of the system is to be used"))
    for _ in range(3):
        with PeakMemory() as peak:
            torch.ones(64 * 2**20, dtype=torch.uint8)
        assert 60 * 2**20 < peak.growth < 200 * 2**20
    with PeakMemory() as peak:
        pass
    assert peak.growth < 16 * 2**20  # the earlier peaks are not this block's


def test_memory_that_was_freed_before_does_not_hide_a_peak():
    freed = [torch.ones(100_000, dtype=torch.uint8) for _ in range(2000)]
    above = [torch.ones(100_000, dtype=torch.uint8) for _ in range(20)]  # holds the heap's end, so that it stays large
    freed.clear()
    with PeakMemory() as peak:
        torch.ones(64 * 2**20, dtype=torch.uint8)
    assert 60 * 2**20 < peak.growth < 200 * 2**20 and len(above) == 20


@pytest.mark.parametrize("system", ["other", "mark_refused", "mark_not_told"])
def test_elsewhere_the_memory_of_a_process_is_looked_at_again_and_again(monkeypatch, tmp_path, system):
    if system != "other":
        (tmp_path / "status").write_text("VmRSS: 100 kB\n" if system == "mark_not_told" else "VmHWM: 100 kB\n")
    if system == "mark_refused":
        (tmp_path / "clear_refs").mkdir()
    monkeypatch.setattr(memory, "PROC", tmp_path if system != "other" else tmp_path / "none")
    with PeakMemory() as peak:
        held = torch.ones(64 * 2**20, dtype=torch.uint8)
        deadline = time.monotonic() + 30
        while peak.growth < held.numel() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert 60 * 2**20 < peak.growth < 200 * 2**20
    assert threading.active_count() < 20


def test_a_cpu_takes_half_of_what_is_free_and_one_image_needs_no_trial(monkeypatch):
    held = []

    def step(size):
        held.append(torch.ones(size * 128 * 2**20, dtype=torch.uint8))  # 128 MiB an image, given back at once
        held.clear()

    class Free:
        available = 2 * (128 * 8 + 64) * 2**20  # twice what eight images need, and a bit

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Free)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    cpu = torch.device("cpu")
    assert largest_micro_batch(step, 16, cpu) == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # two processes share it
    assert largest_micro_batch(step, 16, cpu) == 4
    monkeypatch.setattr(Free, "available", 2**20)
    with pytest.raises(UserError, match="not even one image fits into the memory of cpu"):
        largest_micro_batch(step, 16, cpu)


def test_the_moments_to_come_are_counted_until_they_are_there():
    layer = torch.nn.Linear(10, 10)
    optimizer = make_optimizer(layer.named_parameters(), learning_rate=1e-3, betas=(0.9, 0.9), weight_decay=0.0)
    assert optimizer_bytes_to_come([optimizer]) == 2 * 110 * 4
    layer(torch.ones(1, 10)).sum().backward()
    optimizer.step()
    assert optimizer_bytes_to_come([optimizer]) == 0


def test_a_trial_of_a_real_step_changes_nothing():
    loss = {"discriminator_start": 500, "adversarial_start": 500, "likelihood": "learned", "latent_noise": 1.0}
    updater, other = (make_updater(loss=loss) for _ in range(2))
    before, random_state = weights(updater), torch.get_rng_state()
    assert updater.largest_micro_batch(4, 16, 32) == 4
    assert moved(before, weights(updater)) == set() and torch.equal(torch.get_rng_state(), random_state)
    networks = updater.networks.values()
    assert all(p.grad is None for network in networks for p in network.module.parameters())
    assert not any(network.optimizer.state for network in networks)
    run(updater, 2)
    run(other, 2)
    assert moved(weights(updater), weights(other)) == set()


def test_a_trial_has_every_term_on(monkeypatch):
    updater = make_updater(loss={"discriminator_start": 500, "adversarial_start": 500, "equivariance": 1.0})
    stepped, outputs = [], []
    clear = type(updater._optimizers).clear

    def noting(self):
        stepped.extend(n for n, network in self.networks.items() if all(p.grad is not None for p in network.trained()))
        clear(self)

    monkeypatch.setattr(type(updater._optimizers), "clear", noting)
    updater.step.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    updater.try_micro_batch(3, 16, 32)
    assert stepped == ["autoencoder", "discriminator"]
    assert [output.reconstructions.shape for output in outputs] == [(3, 3, 16, 32)]  # and nothing is shrunk


def test_gradients_are_cleared_where_a_trial_runs_out_of_memory(monkeypatch):
    updater = make_updater()

    def discriminator(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(updater.objective, "discriminator", discriminator)
    with pytest.raises(torch.OutOfMemoryError):
        updater.try_micro_batch(2, 16, 16)
    assert all(p.grad is None for p in updater.vae.parameters())
