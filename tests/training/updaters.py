"""A tiny updater without recipe and files: f2, 16 px, discriminator, LPIPS off; and batches of made-up images."""

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin

from latentvae.assembly import processes
from latentvae.data.pipeline import Batch
from latentvae.images import PixelFormat
from latentvae.losses.config import LossConfig
from latentvae.losses.discriminator import DiscriminatorConfig, PatchDiscriminator
from latentvae.losses.likelihood import LearnedLogvar
from latentvae.losses.objective import Objective
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.training.checkpoints import TrainedNetwork
from latentvae.training.config import TrainingConfig
from latentvae.training.optim import make_optimizer
from latentvae.training.update import Updater

GLOBAL_BATCH = 4
TRAINING = {
    "total_images": 1000,
    "global_batch_size": GLOBAL_BATCH,
    "micro_batch_size": 2,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "mixed_precision": "no",
    "ema_decay": 0.0,
}
LOSS = {
    "perceptual": "none",
    "kl_weight": 1e-3,
    "adversarial_weight": 0.5,
    "discriminator_start": 0,
    "adversarial_start": 0,
    "discriminator": DiscriminatorConfig(base_channels=8, num_layers=1),
}


def tiny_autoencoder(**changes) -> AutoencoderKL:
    torch.manual_seed(0)
    small = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 2,
    }
    return AutoencoderKL.from_preset("f8c4-tiny", **(small | changes))


def make_updater(training=None, loss=None, *, vae=None, dtype=torch.float32, **arguments) -> Updater:
    """`training`, `loss`: fields that differ from those above. What `vae` lets train is what trains."""
    config = TrainingConfig(**(TRAINING | (training or {})))
    objective = Objective.from_config(LossConfig(**(LOSS | (loss or {}))).resolved(config.total_images))
    accumulation = config.accumulation(processes().num_processes)[1]
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation),
    )
    modules = {"autoencoder": vae if vae is not None else tiny_autoencoder()}
    if objective.config.has_adversarial:
        torch.manual_seed(1)
        modules["discriminator"] = PatchDiscriminator(3, objective.config.discriminator)
    if objective.config.likelihood == "learned":
        modules["likelihood"] = LearnedLogvar()
    networks = {}
    for name, module in modules.items():
        module.to(dtype)
        optimizer = make_optimizer(
            module.named_parameters(),
            learning_rate=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        networks[name] = TrainedNetwork(module, optimizer)
    pixels = PixelFormat(channels=3, dtype="uint8")
    return Updater(config, accelerator, objective, networks, modules["autoencoder"], pixels, **arguments)


def micro_batches(updater: Updater, images_seen: int, side: int = 16) -> list[Batch]:
    """This process's share of the step that follows `images_seen` images."""
    accelerator = updater.accelerator
    micro, count = updater.config.accumulation(accelerator.num_processes)
    first = images_seen + accelerator.process_index * micro * count
    batches = []
    for start in range(first, first + micro * count, micro):
        positions = list(range(start, start + micro))
        drawn = [
            torch.randint(0, 256, (side, side, 3), generator=torch.Generator().manual_seed(p), dtype=torch.uint8)
            for p in positions
        ]
        batches.append(Batch(torch.stack(drawn), [f"image {p}" for p in positions], positions))
    return batches


def run(updater: Updater, steps: int, start: int = 0) -> list[dict[str, torch.Tensor]]:
    """What each of so many updates returned."""
    seen = [start + GLOBAL_BATCH * step for step in range(steps)]
    return [updater.update(micro_batches(updater, images_seen), images_seen, stop=False) for images_seen in seen]


def weights(updater: Updater) -> dict[str, torch.Tensor]:
    """A copy of every parameter as `network.name`."""
    return {
        f"{network}.{name}": parameter.detach().clone()
        for network, trained in updater.networks.items()
        for name, parameter in trained.module.named_parameters()
    }


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """The names of what differs in any bit."""
    return {name for name in before if not torch.equal(before[name], after[name])}
