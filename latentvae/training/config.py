"""What a run does and how often: the `training` and `validation` sections of a recipe."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, model_validator

from latentvae.data.pipeline import micro_batch_size_of
from latentvae.errors import UserError


class LoRAConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Low-rank updates of a frozen starting model (Hu et al. 2022), by peft; the shipped model has them merged."""

    rank: int = Field(16, ge=1, description="of each update")
    alpha: float | None = Field(None, gt=0, description="updates are scaled by alpha / rank; null: alpha = rank")
    targets: tuple[str, ...] | None = Field(
        None, description="regular expressions of module names; null: every convolution and projection of the decoder"
    )


class TrainingConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Optimisation, precision and bookkeeping. Progress is counted in images."""

    total_images: int = Field(10_000_000, ge=1, description="images after which the run is finished")
    global_batch_size: int = Field(256, ge=1, description="images per optimizer step over all processes (LightningDiT)")
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        16,
        description="upper bound of images per process and forward; the largest divisor of "
        "global_batch_size / processes that is not above it is used; auto: the largest that fits, tried on the device",
    )
    max_minutes: float | None = Field(
        None,
        gt=0,
        description="time budget of the run over all resumes, in minutes; the run then finishes early, and the "
        "learning rate schedule follows whichever of time and images is nearer its end",
    )
    learning_rate: float = Field(1e-4, gt=0, description="peak, of the autoencoder (LightningDiT at batch 256)")
    discriminator_learning_rate: float | None = Field(None, gt=0, description="None: as learning_rate (LDM)")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW, autoencoder and discriminator (RAE)")
    weight_decay: float = Field(0.0, ge=0, description="AdamW, not on norms and biases (RAE: 0)")
    warmup_images: int = Field(0, ge=0, description="linear warm-up of both learning rates, in images")
    schedule: Literal["constant", "cosine"] = Field("constant", description="after the warm-up (LDM: constant)")
    final_learning_rate: float = Field(
        0.1, ge=0, le=1, description="where cosine ends, as a fraction of the peak (RAE: one tenth)"
    )
    max_grad_norm: float = Field(1.0, gt=0, description="clip of the global gradient norm, per network")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = Field(
        "auto", description="autocast of the network; auto: bf16 where the hardware has it, fp16 on older GPUs, else no"
    )
    parameter_dtype: Literal["float32", "float64"] = Field("float32", description="of the trained weights")
    channels_last: bool = Field(True, description="memory layout of the networks; the numbers are the same")
    gradient_checkpointing: bool = Field(
        False, description="recompute activations in the backward: slower, less memory"
    )
    compile: bool = Field(False, description="torch.compile the networks: minutes at the start, faster steps on a GPU")
    allow_tf32: bool = Field(True, description="TensorFloat-32 for what runs in float32 on an NVIDIA GPU")
    seed: int = Field(0, ge=0, description="of initial weights, data order, augmentation and posterior noise")
    trainable: Literal["all", "decoder"] | tuple[str, ...] = Field(
        "all",
        description="decoder: encoder and quant_conv are frozen, so existing latents stay valid; or a list of regular "
        "expressions, of which one must match the whole name of a parameter",
    )
    lora: LoRAConfig | None = Field(None, description="train low-rank updates instead of the weights themselves")
    decoder_only_start: int | None = Field(
        None,
        ge=0,
        description="images seen after which the encoder is frozen and latent noise ends (l-DeTok); null: never",
    )
    posterior_sigma: float | None = Field(
        None, gt=0, description="standard deviation of every posterior; null: learned for each latent element"
    )
    on_nonfinite: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="what a loss or gradient that is not finite does: end the run, leave that step out, or go back to "
        "the weights of the last checkpoint and on with the next images",
    )
    max_nonfinite: int = Field(10, ge=1, description="how often it may skip or roll back before the run ends after all")
    ema_decay: float = Field(0.9999, ge=0, lt=1, description="per optimizer step, 0: no EMA (LDM, DC-Gen)")
    ema_warmup_steps: float = Field(
        2000, ge=0, description="t of decay * (1 - exp(-steps / t)): the average forgets its start (DC-Gen)"
    )
    save_every_images: int = Field(500_000, ge=1, description="images between checkpoints; the end always has one")
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints that stay on disk")
    best_metric: Literal["psnr", "lpips", "none"] = Field(
        "psnr", description="RUN/best is the model of the validation that was best in it; none: no such folder"
    )
    validate_every_images: int = Field(100_000, ge=1, description="images between validations")
    log_every_images: int = Field(2_560, ge=1, description="images between lines of the log and the trackers")
    trackers: tuple[str, ...] = Field(
        ("tensorboard",), description="any of Accelerate's trackers by name: tensorboard, wandb, ...; [] for none"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.parameter_dtype == "float64" and self.mixed_precision not in ("no", "auto"):
            raise ValueError("parameter_dtype float64 needs mixed_precision no")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must lie in [0, 1)")
        if self.lora is not None and self.trainable != "all":
            raise ValueError("lora says what trains beside a frozen model: set training.trainable=all, or no lora")
        return self

    def accumulation(self, num_processes: int, limit: int | None = None) -> tuple[int, int]:
        """(images per process and forward, forwards per optimizer step) for this many processes.

        `limit` stands in for a micro_batch_size that is auto.

        Raises:
            UserError: global_batch_size is not a multiple of the number of processes.
        """
        per_process, rest = divmod(self.global_batch_size, num_processes)
        if rest or per_process == 0:
            raise UserError(
                f"training.global_batch_size is {self.global_batch_size}; with {num_processes} processes it must be "
                f"a multiple of {num_processes}"
            )
        limit = self.micro_batch_size if self.micro_batch_size != "auto" else limit
        if limit is None:
            raise ValueError("micro_batch_size is auto: it has to be measured first")
        micro = micro_batch_size_of(per_process, limit)
        return micro, per_process // micro


class ValidationConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Images that are never trained on, looked at and measured while training runs."""

    source: str | None = Field(None, description="as data.source; None: a part of data.source is held out")
    fraction: float = Field(
        0.02,
        ge=0,
        lt=1,
        description="part of data.source, at least one image, held out by hash of the key where source is None"
        "; 0: none",
    )
    resolution: int | None = Field(None, ge=1, description="pixels, after resize and centre crop; None: as data")
    max_images: int = Field(256, ge=1, description="upper bound of images per validation")
    batch_size: int = Field(8, ge=1, description="images per forward")
    num_pictures: int = Field(8, ge=0, description="images in the picture of originals and reconstructions")
