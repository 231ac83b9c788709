"""What trains when: the phases of a run, as functions of the images seen."""

from dataclasses import dataclass

from latentvae.errors import UserError
from latentvae.losses.config import LossConfig
from latentvae.losses.objective import Objective
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.training.config import TrainingConfig
from latentvae.training.step import encoder_parts


@dataclass(frozen=True)
class Phase:
    """What the step that follows so many images does.

    Attributes:
        autoencoder: it trains; else it only reconstructs, for a discriminator that warms up.
        encoder: what comes before the latents may train too, as far as it was selected.
        discriminator: it trains.
        latent_noise: gamma of the noise that is mixed into the latents; 0: none.
    """

    autoencoder: bool
    encoder: bool
    discriminator: bool
    latent_noise: float


def phase_at(config: TrainingConfig, objective: Objective, images_seen: int, *, has_discriminator: bool) -> Phase:
    """The phase of the step after `images_seen` images."""
    finishes = config.decoder_only_start is not None and images_seen >= config.decoder_only_start
    return Phase(
        autoencoder=objective.active_autoencoder(images_seen),
        encoder=not finishes,
        discriminator=has_discriminator and objective.active_discriminator(images_seen),
        latent_noise=0.0 if finishes else objective.config.latent_noise,
    )


def check_phases(config: TrainingConfig, loss: LossConfig, vae: AutoencoderKL) -> None:
    """Raise a UserError where a phase would train nothing; which parameters train must be selected by then."""
    if loss.autoencoder_start > 0 and not loss.has_adversarial:
        raise UserError(
            f"loss.autoencoder_start is {loss.autoencoder_start}, but there is no discriminator to train before it: "
            "set loss.adversarial_weight above 0, or loss.autoencoder_start=0"
        )
    start = loss.discriminator_start or 0
    if loss.autoencoder_start > 0 and start > 0:
        raise UserError(
            f"nothing trains on the first {min(start, loss.autoencoder_start)} images, since loss.discriminator_start "
            f"is {start} and loss.autoencoder_start {loss.autoencoder_start}: set loss.discriminator_start=0"
        )
    if config.decoder_only_start is not None:
        before = {id(parameter) for part in encoder_parts(vae) for parameter in part.parameters()}
        if not any(parameter.requires_grad and id(parameter) not in before for parameter in vae.parameters()):
            raise UserError(
                "training.decoder_only_start freezes the encoder, and training.trainable selects nothing else: "
                "select parameters of the decoder too, or leave decoder_only_start out"
            )
