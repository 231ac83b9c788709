"""A recipe small enough that a test trains it in seconds: f2, discriminator, EMA, one worker process."""

from pathlib import Path

from latentvae.recipe import Recipe, load_recipe

SETTINGS = (
    "model.block_out_channels=[8,16]",
    "model.down_block_types=[DownEncoderBlock2D,DownEncoderBlock2D]",
    "model.up_block_types=[UpDecoderBlock2D,UpDecoderBlock2D]",
    "model.layers_per_block=1",
    "model.norm_num_groups=2",
    "model.mid_block_add_attention=false",
    "data.resolution=16",
    "data.num_workers=1",
    "loss.perceptual=none",
    "loss.adversarial_weight=0.5",
    "loss.discriminator_start=8",
    "loss.adversarial_start=16",
    "loss.discriminator.base_channels=8",
    "loss.discriminator.num_layers=1",
    "training.total_images=32",
    "training.global_batch_size=4",
    "training.micro_batch_size=2",
    "training.learning_rate=1e-3",
    "training.ema_decay=0.9",
    "training.ema_warmup_steps=2",
    "training.save_every_images=1000",
    "training.validate_every_images=1000",
    "training.log_every_images=8",
    "training.trackers=[]",
    "validation.fraction=0.25",
    "validation.num_pictures=2",
)


def tiny_settings(source: Path, *overrides: str) -> list[str]:
    """The settings above for images in `source`, as `--set` takes them; later ones win."""
    return [*SETTINGS, f"data.source={source}", *overrides]


def tiny_recipe(source: Path, *overrides: str) -> Recipe:
    """The settings above as a recipe."""
    return load_recipe(None, tiny_settings(source, *overrides))
