"""What the autoencoder and the discriminator minimise: the `loss` section of a recipe."""

from typing import Any, Literal, Self

from pydantic import BaseModel, Field, model_validator

from latentvae.losses.discriminator import DiscriminatorConfig
from latentvae.losses.perceptual import PerceptualNet

DISCRIMINATOR_START = 0.375  # of the run: RAE starts its discriminator at epoch 6 of 16
ADVERSARIAL_START = 0.5  # of the run: RAE's generator meets it at epoch 8 of 16
KL_WARMUP = 0.1  # of the run; ours
KL_CYCLE = 0.25  # of the run: Fu et al. 2019 rise four times
RESOLVED = (
    "discriminator_start",
    "adversarial_start",
    "kl_warmup_images",
    "kl_cycle_images",
)  # null: a share of the run


class ExtraTerm(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """A term of the user's own: one value per image, added with its weight."""

    term: str = Field(description="python:module:Class, called as term(images, reconstructions, moments) => (B,)")
    weight: float = Field(default=1.0, description="of its mean over the batch")
    arguments: dict[str, Any] = Field(default_factory=dict, description="what the class is made with")


class LossConfig(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """Every term is the mean over its elements, so weights mean the same at any resolution and batch size."""

    reconstruction: Literal["l1", "l2", "charbonnier"] = Field(
        default="l1", description="pixel term: mean absolute error, mean squared error, or sqrt(error^2 + eps^2) - eps"
    )
    reconstruction_weight: float = Field(default=1.0, ge=0, description="weight of the pixel term (LDM: 1)")
    charbonnier_eps: float = Field(
        default=1e-3, gt=0, description="where Charbonnier turns from square to linear, on [-1, 1] (Lai et al. 2017)"
    )
    ssim_weight: float = Field(default=0.0, ge=0, description="weight of 1 - SSIM (Wang et al. 2004); 0 is off")
    perceptual: PerceptualNet | Literal["none"] = Field(
        default="vgg",
        description="LPIPS backbone; its ImageNet weights come from torch's cache or a download "
        "(vgg 528 MB, alex 233 MB, squeeze 5 MB)",
    )
    perceptual_weight: float = Field(default=1.0, ge=0, description="weight of LPIPS (LDM: 1; sd-vae-ft-mse: 0.1)")
    perceptual_bands: tuple[tuple[int, int, int], ...] | None = Field(
        default=None,
        min_length=1,
        description="for images neither RGB nor gray: channel triplets shown to LPIPS as R, G, B",
    )
    kl_weight: float = Field(
        default=2.08e-8,
        ge=0,
        description="weight of the KL term, nats per latent element; LDM's 1e-6 is 2.08e-8 at f8c4",
    )
    kl_schedule: Literal["constant", "linear", "cyclical"] = Field(
        default="constant",
        description="kl_weight from the start, rising from 0 once, or rising again and again (Fu et al. 2019)",
    )
    kl_warmup_images: int | None = Field(
        default=None, ge=1, description="linear: images until kl_weight is reached; null: 10 percent of the run"
    )
    kl_cycle_images: int | None = Field(
        default=None,
        ge=1,
        description="cyclical: images from one rise to the next; null: a quarter of the run (Fu et al.)",
    )
    kl_ramp: float = Field(
        default=0.5, gt=0, le=1, description="cyclical: part of each cycle in which it rises (Fu et al.: 0.5)"
    )
    free_bits: float = Field(
        default=0.0,
        ge=0,
        description="nats per latent element that each channel may carry free of charge (Kingma et al. 2016)",
    )
    likelihood: Literal["fixed", "learned", "optimal"] = Field(
        default="fixed",
        description="of an image given its latent: errors as they are, divided by a learned variance (LDM's logvar), "
        "or by each image's own optimal one (sigma-VAE, Rybkin et al. 2021)",
    )
    anchor_weight: float = Field(
        default=0.0,
        ge=0,
        description="fine-tuning: weight of the squared distance of normalized latents from the starting encoder's",
    )
    equivariance: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="probability that a step shrinks and turns the latents and the images alike (EQ-VAE: 0.5)",
    )
    equivariance_scales: tuple[int, int] = Field(
        default=(8, 31), description="smallest and largest size of such a latent, in 32nds (EQ-VAE)"
    )
    equivariance_rotation: bool = Field(default=True, description="turn it by a quarter, a half or three quarters too")
    latent_noise: float = Field(
        default=0.0,
        ge=0,
        description="gamma of z' = (1 - t) z + t gamma noise with t uniform in [0, 1] per image (l-DeTok: 3); 0 is off",
    )
    extra: tuple[ExtraTerm, ...] = Field(default=(), description="terms of your own")
    adversarial_weight: float = Field(
        default=0.0, ge=0, description="0 is off; LDM: 0.5 with the adaptive balance; REPA-E: 0.1 with the constant one"
    )
    adversarial_balance: Literal["adaptive", "constant"] = Field(
        default="adaptive",
        description="adaptive: the weight is multiplied by a ratio of gradient norms at the last layer (LDM)",
    )
    adversarial_loss: Literal["hinge", "non_saturating"] = Field(
        default="hinge",
        description="of generator and discriminator (hinge: LDM; non_saturating: Goodfellow et al. 2014)",
    )
    adaptive_max: float = Field(
        default=0.051, gt=0, description="upper bound of that ratio; LDM's 1e4 is 0.051 at 256 px"
    )
    adaptive_eps: float = Field(
        default=1e-4, gt=0, description="added to the adversarial gradient norm in that ratio (LDM)"
    )
    autoencoder_start: int = Field(
        default=0,
        ge=0,
        description="images seen before the autoencoder trains: a new discriminator warms up on a finished, frozen one",
    )
    discriminator_start: int | None = Field(
        default=None,
        ge=0,
        description="images seen before the discriminator trains; null: 37.5 percent of the run (RAE)",
    )
    adversarial_start: int | None = Field(
        default=None, ge=0, description="images seen before the decoder feels it; null: 50 percent of the run (RAE)"
    )
    discriminator: DiscriminatorConfig = Field(default=DiscriminatorConfig(), description="size of the discriminator")

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.equivariance_scales
        if not 1 <= low <= high <= 32:
            raise ValueError(f"equivariance_scales is [{low}, {high}]; give two of 1 to 32, the smaller one first")
        early, late = self.discriminator_start, self.adversarial_start
        if early is not None and late is not None and late < early:
            raise ValueError(
                f"adversarial_start {late} is before discriminator_start {early}: an untrained discriminator would "
                "harm the decoder; start it later"
            )
        return self

    @property
    def has_perceptual(self) -> bool:
        return self.perceptual != "none" and self.perceptual_weight > 0

    @property
    def has_adversarial(self) -> bool:
        return self.adversarial_weight > 0

    def resolved(self, total_images: int) -> Self:
        """The same with all shares of the run in images; what was given is kept, and starts never contradict it."""
        early, late = self.discriminator_start, self.adversarial_start
        if early is None:
            early = round(DISCRIMINATOR_START * total_images)
            early = early if late is None else min(early, late)
        if late is None:
            late = max(round(ADVERSARIAL_START * total_images), early)
        return self.model_copy(
            update={
                "discriminator_start": early,
                "adversarial_start": late,
                "kl_warmup_images": self.kl_warmup_images or max(round(KL_WARMUP * total_images), 1),
                "kl_cycle_images": self.kl_cycle_images or max(round(KL_CYCLE * total_images), 1),
            }
        )
