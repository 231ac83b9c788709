"""One optimizer step of the autoencoder and of the discriminator, over micro-batches and processes."""

import logging
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from latentvae.data.pipeline import Batch
from latentvae.images import PixelFormat, to_model
from latentvae.keyed import keyed_noise
from latentvae.losses.objective import Objective
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.training.checkpoints import TrainedNetwork
from latentvae.training.config import TrainingConfig
from latentvae.training.memory import largest_micro_batch, optimizer_bytes_to_come
from latentvae.training.micro_step import StepDraws, StepInputs
from latentvae.training.nonfinite import NonFiniteLoss, describe_nonfinite, is_any_nonfinite
from latentvae.training.phases import Phase, check_phases, phase_at
from latentvae.training.precision import check_compiler, set_tf32
from latentvae.training.step import AutoencoderStep, encoder_parts
from latentvae.training.stepping import Optimizers

__all__ = ["NonFiniteLoss", "Updater"]

logger = logging.getLogger("latentvae")


class Updater:
    """Owns the prepared networks; `update` takes one optimizer step with each that is due.

    Args:
        networks: "autoencoder" and, where they are trained, "discriminator" and "likelihood" (the log variance of the
            likelihood). What requires a gradient by now is what trains; phases of the run may freeze some of it.
        anchor: images [-1, 1] (B, C, H, W) => posterior means (B, c, h, w) of the starting encoder, without gradient;
            None: nothing holds the latents where they were.
        seconds_before: training time of earlier starts of this run.

    Attributes:
        step, discriminator: the only way to a trained forward, since through them DDP averages the gradients.
        stop_agreed: a process asked for a stop at the last update.
        was_skipped: the last step was thrown away, because of what was not finite, or the fp16 loss scaler skipped that
            of the autoencoder.
        trained_autoencoder: the last update changed its weights, as far as any are trained.
        num_nonfinite: steps left out so far because of what was not finite (`on_nonfinite: skip`); a resume sets it,
            and who rolls back counts here too.
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
        anchor: nn.Module | None = None,
        seconds_before: float = 0.0,
    ) -> None:
        self.config, self.accelerator, self.objective = config, accelerator, objective
        self.networks, self.vae, self.pixels, self.anchor = networks, vae, pixels, anchor
        self.stop_agreed = self.was_skipped = self.trained_autoencoder = False
        self.num_nonfinite = 0
        self.seconds = self._seconds_before = seconds_before
        self._began = time.monotonic()
        self._optimizers = Optimizers(config, networks, accelerator.scaler)
        self._draws = StepDraws(vae, objective.config, config.seed)
        self._encoder = [p for part in encoder_parts(vae) for p in part.parameters() if p.requires_grad]
        check_phases(config, objective.config, vae)
        set_tf32(accelerator.device, allowed=config.allow_tf32)
        if config.compile:
            check_compiler(accelerator.device)
        self.step = self._wrapped_step()
        self.discriminator: nn.Module | None = None
        if "discriminator" in networks:
            self.discriminator = self._wrapped(networks["discriminator"].module)

    def _wrapped_step(self) -> nn.Module:
        likelihood = self.networks.get("likelihood")
        return self._wrapped(AutoencoderStep(self.vae, None if likelihood is None else likelihood.module))

    def _wrapped(self, module: nn.Module) -> nn.Module:
        if self.config.compile:
            module.compile()  # in place: no parameter changes its name
        prepared: nn.Module = self.accelerator.prepare(module)
        return prepared

    def progress(self, images_seen: int) -> float:
        """Part of the run that is done, in [0, 1], by images or by time, whichever is further."""
        done = images_seen / self.config.total_images
        if self.config.max_minutes is not None:
            done = max(done, self.seconds / (60 * self.config.max_minutes))
        return min(done, 1.0)

    def update(self, micro_batches: list[Batch], images_seen: int, *, stop: bool) -> dict[str, Tensor]:
        """One step; returns scalars: the mean of each term over this process's images, gradient norms, learning rate.

        Of a step that was thrown away only the learning rate is returned.

        Args:
            images_seen: before this step.
            stop: this process was asked to stop.

        Raises:
            NonFiniteLoss: on every process, before any update, naming terms and images.
        """
        accelerator = self.accelerator
        rate = self._optimizers.set_learning_rates(images_seen, self.progress(images_seen))
        phase = phase_at(self.config, self.objective, images_seen, has_discriminator=self.discriminator is not None)
        self._enter(phase)
        active = [n for n in self.networks if (phase.discriminator if n == "discriminator" else phase.autoencoder)]
        prepared = [self.step] if self.discriminator is None else [self.step, self.discriminator]
        collected: list[dict[str, Tensor]] = []
        norms: dict[str, Tensor] = {}
        for batch in micro_batches:
            with accelerator.accumulate(*prepared):
                collected.append(self._micro_step(batch, images_seen, phase))
                if not accelerator.sync_gradients:
                    continue
                norms = self._optimizers.clip(active)
                if self._agree(collected, norms, stop=stop):
                    self._throw_away(describe_nonfinite(collected, norms, micro_batches), images_seen)
                    return {"learning_rate": torch.tensor(rate)}
                self.was_skipped = not self._optimizers.step(norms)
        self.trained_autoencoder = phase.autoencoder and not self.was_skipped
        means = {name: torch.stack([terms[name].mean() for terms in collected]).mean() for name in collected[0]}
        norms_logged = {f"{name}_grad_norm": norm.detach() for name, norm in norms.items()}
        return means | norms_logged | {"learning_rate": torch.tensor(rate)}

    def largest_micro_batch(self, per_process: int, height: int, width: int) -> int:
        """The most images of this size, in pixels, that a forward may have: the same on every process.

        Nothing is updated and no random state is used. See `memory.largest_micro_batch`.
        """
        return largest_micro_batch(
            lambda size: self.try_micro_batch(size, height, width),
            per_process,
            self.accelerator.device,
            to_come=optimizer_bytes_to_come(network.optimizer for network in self.networks.values()),
        )

    def try_micro_batch(self, size: int, height: int, width: int) -> None:
        """Forward and backward of both networks with every term on, for `size` made-up images; no process waits.

        Clears all gradients, also where it fails.
        """
        phase = Phase(
            autoencoder=True,
            encoder=True,
            discriminator=self.discriminator is not None,
            latent_noise=self.objective.config.latent_noise,
        )
        shape = (self.vae.config.in_channels, height, width)
        images = torch.stack([keyed_noise(shape, "trial", index).clamp(-1, 1) for index in range(size)])
        inputs = self._draws.largest_inputs(self._on_device(images), latent_noise=phase.latent_noise)
        try:
            with ExitStack() as unsynchronised:
                for module in (self.step, self.discriminator):
                    if module is not None:
                        unsynchronised.enter_context(self.accelerator.no_sync(module))
                self._forward_backward(inputs, sys.maxsize, phase, average=lambda tensor: tensor)
        finally:
            self._optimizers.clear()

    def _enter(self, phase: Phase) -> None:
        """Freeze what comes before the latents, or free it again, where the phase says other than the one before.

        DDP waits for the gradients of all that was trainable when it was made: it is made anew.
        """
        if not self._encoder or self._encoder[0].requires_grad == phase.encoder:
            return
        for parameter in self._encoder:
            parameter.requires_grad_(phase.encoder)
            parameter.grad = None
        del self.step
        self.accelerator.free_memory()  # its reference to the old wrapper, whose hooks go with it
        self.step = self._wrapped_step()

    def _on_device(self, images: Tensor) -> Tensor:
        """In the dtype and the memory layout of the network."""
        images = images.to(self.accelerator.device, next(self.vae.parameters()).dtype)
        return images.contiguous(memory_format=torch.channels_last) if self.config.channels_last else images

    def _micro_step(self, batch: Batch, images_seen: int, phase: Phase) -> dict[str, Tensor]:
        """Forward and backward of both networks on one micro-batch; returns (B,) values of every term."""
        images = self._on_device(to_model(batch.images.to(self.accelerator.device), self.pixels))
        inputs = self._draws.inputs(images, batch.positions, images_seen, latent_noise=phase.latent_noise)
        return self._forward_backward(inputs, images_seen, phase, average=self._average)

    def _forward_backward(
        self, inputs: StepInputs, images_seen: int, phase: Phase, *, average: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor]:
        """`average`: the mean over processes of a small tensor."""
        accelerator = self.accelerator
        with torch.set_grad_enabled(phase.autoencoder):
            output = self.step(inputs.images, inputs.noise, inputs.transform, inputs.latent_noise)
        # The generator's term only reads the discriminator, so it goes past DDP, whose hooks must not fire here.
        critic = None
        if self.discriminator is not None:
            critic = accelerator.unwrap_model(self.discriminator, keep_fp32_wrapper=True)
        anchor = None
        if self.anchor is not None:
            with accelerator.autocast():  # as the encoder that it is compared with
                anchor = self.anchor(inputs.images)
        generator = self.objective.generator(
            inputs.targets,
            output,
            last_layer=self.vae.decoder.conv_out,
            discriminator=critic,
            images_seen=images_seen,
            average=average,
            anchor=anchor,
        )
        terms = dict(generator.terms)
        if phase.autoencoder:
            accelerator.backward(generator.loss)
            if generator.adaptive_weight is not None:
                terms["adaptive_weight"] = generator.adaptive_weight.detach().reshape(1)
        if self.discriminator is not None and phase.discriminator:
            loss = self.objective.discriminator(self.discriminator, inputs.targets, output.reconstructions.detach())
            accelerator.backward(loss.loss)
            terms |= loss.terms
            terms |= {f"discriminator_{name}": value.reshape(1) for name, value in loss.watched.items()}
        return terms

    def _average(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, "mean") if self.accelerator.num_processes > 1 else tensor

    def _agree(self, collected: list[dict[str, Tensor]], norms: dict[str, Tensor], *, stop: bool) -> bool:
        """All processes together, before the update: is a stop asked for, what time is it; is anything not finite?

        With fp16 an infinite gradient norm is the loss scaler's business: it skips the step and scales down.
        """
        nonfinite = is_any_nonfinite(collected, norms if self.accelerator.scaler is None else {})
        seconds = self._seconds_before + time.monotonic() - self._began if self.accelerator.is_main_process else 0.0
        # In float32, since MPS has nothing wider: half a second of rounding after 97 days.
        flags = torch.tensor([0.0, float(stop), seconds], dtype=torch.float32, device=nonfinite.device)
        flags[0] = nonfinite
        if self.accelerator.num_processes > 1:
            flags = self.accelerator.reduce(flags, "sum")
        any_nonfinite, stops, self.seconds = flags.tolist()
        self.stop_agreed = stops > 0
        return any_nonfinite > 0

    def _throw_away(self, found: list[str], images_seen: int) -> None:
        """On every process: drop the gradients of this step; NonFiniteLoss where it may not simply be left out.

        `found`: what was not finite on this process.
        """
        self._optimizers.throw_away()
        self.was_skipped, self.trained_autoencoder = True, False
        told = f"not finite after {images_seen} images: {'; '.join(gather_object(found))}"
        if self.config.on_nonfinite == "skip":
            self.num_nonfinite += 1
            limit = self.config.max_nonfinite
            if self.num_nonfinite <= limit:
                logger.warning("%s. This step is left out, %d of at most %d", told, self.num_nonfinite, limit)
                return
        raise NonFiniteLoss(
            f"{told}. Nothing was updated and the checkpoints are untouched. Try a lower training.learning_rate or "
            "training.mixed_precision=no"
        )
