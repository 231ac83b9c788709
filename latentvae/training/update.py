"""One optimizer step of the autoencoder and of the discriminator, over micro-batches and processes."""

import time

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentvae.data.pipeline import Batch
from latentvae.images import PixelFormat, to_model
from latentvae.keyed import keyed_noise
from latentvae.losses.objective import Objective
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.training.checkpoints import TrainedNetwork
from latentvae.training.config import TrainingConfig
from latentvae.training.optim import learning_rate_at, nonfinite_terms, set_learning_rate
from latentvae.training.step import AutoencoderStep

MIN_LOSS_SCALE = 2.0**-10  # of the 65536 that it starts from; only gradients that are never finite bring it here


class NonFiniteLoss(RuntimeError):
    """A loss term or a gradient was NaN or infinite; nothing was updated."""


class Updater:
    """Owns the prepared networks; `update` takes one optimizer step with each that is due.

    Args:
        networks: "autoencoder" and, where one is trained, "discriminator".
        seconds_before: training time of earlier starts of this run.

    Attributes:
        stop_agreed: a process asked for a stop at the last update.
        was_skipped: the fp16 loss scaler skipped the last step of the autoencoder.
        seconds: training time of the run by the first process's clock, as of the last update, so that all processes
            take the same decisions from it.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        objective: Objective,
        networks: dict[str, TrainedNetwork],
        vae: AutoencoderKL,
        pixels: PixelFormat,
        *,
        seconds_before: float = 0.0,
    ) -> None:
        self.config, self.accelerator, self.objective = config, accelerator, objective
        self.networks, self.vae, self.pixels = networks, vae, pixels
        self.stop_agreed = False
        self.seconds = self._seconds_before = seconds_before
        self._began = time.monotonic()
        # Every trained forward goes through these, so that DDP averages its gradients.
        self.step = accelerator.prepare(AutoencoderStep(vae, train_encoder=config.trainable == "all"))
        self.discriminator: nn.Module | None = None
        if "discriminator" in networks:
            self.discriminator = accelerator.prepare(networks["discriminator"].module)
        self.was_skipped = False

    def progress(self, images_seen: int) -> float:
        """Part of the run that is done, in [0, 1], by images or by time, whichever is further."""
        done = images_seen / self.config.total_images
        if self.config.max_minutes is not None:
            done = max(done, self.seconds / (60 * self.config.max_minutes))
        return min(done, 1.0)

    def update(self, micro_batches: list[Batch], images_seen: int, *, stop: bool) -> dict[str, Tensor]:
        """One step; returns scalars: the mean of each term over this process's images, gradient norms, learning rate.

        Args:
            images_seen: before this step.
            stop: this process was asked to stop.

        Raises:
            NonFiniteLoss: on every process, before any update, naming terms and images.
        """
        accelerator = self.accelerator
        rate = self._set_learning_rates(images_seen)
        train_discriminator = self.discriminator is not None and self.objective.active_discriminator(images_seen)
        prepared = [self.step] if self.discriminator is None else [self.step, self.discriminator]
        active = ["autoencoder", "discriminator"] if train_discriminator else ["autoencoder"]
        collected: list[dict[str, Tensor]] = []
        norms: dict[str, Tensor] = {}
        for batch in micro_batches:
            with accelerator.accumulate(*prepared):
                collected.append(self._micro_step(batch, images_seen, train_discriminator=train_discriminator))
                if not accelerator.sync_gradients:
                    continue
                norms = self._clip(active)
                self._agree(collected, norms, micro_batches, images_seen, stop=stop)
                self._step_optimizers(norms)
        means = {name: torch.stack([terms[name].mean() for terms in collected]).mean() for name in collected[0]}
        norms_logged = {f"{name}_grad_norm": norm.detach() for name, norm in norms.items()}
        return means | norms_logged | {"learning_rate": torch.tensor(rate)}

    def _clip(self, names: list[str]) -> dict[str, Tensor]:
        """Clip the gradients of these networks; returns their norms before that.

        Not by Accelerate: with fp16 its clipping unscales the gradients of all networks once for each.
        """
        norms = {}
        for name in names:
            network = self.networks[name]
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.unscale_(network.optimizer)
            norms[name] = torch.nn.utils.clip_grad_norm_(network.trained(), self.config.max_grad_norm)
        return norms

    def _step_optimizers(self, norms: dict[str, Tensor]) -> None:
        """Step every clipped network, and renew the fp16 loss scale once, after the last of them.

        Not by Accelerate's optimizers: each would renew the scale, and the next unscale its gradients a second time.
        """
        scaler = self.accelerator.scaler
        for name in norms:
            optimizer = self.networks[name].optimizer
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
            optimizer.zero_grad()
        if scaler is not None:
            scaler.update()
            self.was_skipped = not bool(norms["autoencoder"].isfinite())
            if scaler.get_scale() < MIN_LOSS_SCALE:
                raise NonFiniteLoss(
                    f"the fp16 loss scale fell below {MIN_LOSS_SCALE:g}, so gradients overflow at any scale: the "
                    "checkpoints are untouched. Try a lower training.learning_rate or training.mixed_precision=no"
                )

    def _set_learning_rates(self, images_seen: int) -> float:
        config = self.config
        rates = {}
        for name, network in self.networks.items():
            peak = config.learning_rate
            if name == "discriminator" and config.discriminator_learning_rate is not None:
                peak = config.discriminator_learning_rate
            rates[name] = learning_rate_at(
                images_seen + config.global_batch_size,
                learning_rate=peak,
                warmup_images=config.warmup_images,
                total_images=config.total_images,
                schedule=config.schedule,
                final_learning_rate=config.final_learning_rate,
                progress=self.progress(images_seen),
            )
            set_learning_rate(network.optimizer, rates[name])
        return rates["autoencoder"]

    def _micro_step(self, batch: Batch, images_seen: int, *, train_discriminator: bool) -> dict[str, Tensor]:
        """Forward and backward of both networks on one micro-batch; returns (B,) values of every term."""
        accelerator, config = self.accelerator, self.config
        parameter = next(self.vae.parameters())
        images = to_model(batch.images.to(accelerator.device), self.pixels).to(parameter.dtype)
        if config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        side = self.vae.downsample_factor
        shape = (self.vae.config.latent_channels, images.shape[2] // side, images.shape[3] // side)
        # Keyed by the place in the global order of images: any number of processes and any resume see the same.
        noise = torch.stack([keyed_noise(shape, config.seed, position) for position in batch.positions])
        output = self.step(images, noise.to(accelerator.device))
        # The generator's term only reads the discriminator, so it goes past DDP, whose hooks must not fire here.
        critic = None
        if self.discriminator is not None:
            critic = accelerator.unwrap_model(self.discriminator, keep_fp32_wrapper=True)
        generator = self.objective.generator(
            images,
            output,
            last_layer=self.vae.decoder.conv_out,
            discriminator=critic,
            images_seen=images_seen,
            average=self._average,
        )
        accelerator.backward(generator.loss)
        terms = dict(generator.terms)
        if generator.adaptive_weight is not None:
            terms["adaptive_weight"] = generator.adaptive_weight.detach().reshape(1)
        if self.discriminator is not None and train_discriminator:
            loss = self.objective.discriminator(self.discriminator, images, output.reconstructions.detach())
            accelerator.backward(loss.loss)
            terms |= loss.terms
            terms |= {f"discriminator_{name}": value.reshape(1) for name, value in loss.watched.items()}
        return terms

    def _average(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, "mean") if self.accelerator.num_processes > 1 else tensor

    def _agree(
        self,
        collected: list[dict[str, Tensor]],
        norms: dict[str, Tensor],
        batches: list[Batch],
        images_seen: int,
        *,
        stop: bool,
    ) -> None:
        """All processes together, before the update: is everything finite, is a stop asked for, what time is it.

        With fp16 an infinite gradient norm is the loss scaler's business: it skips the step and scales down.
        """
        values = [value for terms in collected for value in terms.values()]
        if self.accelerator.scaler is None:
            values += list(norms.values())
        nonfinite = torch.stack([(~torch.isfinite(value)).any() for value in values]).any()
        seconds = self._seconds_before + time.monotonic() - self._began if self.accelerator.is_main_process else 0.0
        # In float32, since MPS has nothing wider: half a second of rounding after 97 days.
        flags = torch.tensor([0.0, float(stop), seconds], dtype=torch.float32, device=nonfinite.device)
        flags[0] = nonfinite
        if self.accelerator.num_processes > 1:
            flags = self.accelerator.reduce(flags, "sum")
        any_nonfinite, stops, self.seconds = flags.tolist()
        self.stop_agreed = stops > 0
        if any_nonfinite:
            raise NonFiniteLoss(_describe(collected, norms, batches, images_seen))


def _describe(
    collected: list[dict[str, Tensor]], norms: dict[str, Tensor], batches: list[Batch], images_seen: int
) -> str:
    found = []
    for terms, batch in zip(collected, batches, strict=True):
        for name, indices in nonfinite_terms(terms):
            is_per_image = len(terms[name]) == len(batch.keys)  # else one figure for all of them
            keys = [batch.keys[index] for index in indices] if is_per_image else batch.keys
            found.append(f"{name} of {', '.join(keys[:5])}" + (f" and {len(keys) - 5} more" if len(keys) > 5 else ""))
    found += [f"the gradient of the {name}" for name, norm in norms.items() if not torch.isfinite(norm)]
    return (
        f"not finite after {images_seen} images: {'; '.join(found) or 'a term on another process'}. Nothing was "
        "updated and the checkpoints are untouched. Try a lower training.learning_rate or training.mixed_precision=no"
    )
