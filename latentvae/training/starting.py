"""The model that fine-tuning started from: what the latent anchor compares with, and what drift is measured against."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from latentvae.checkpoint import check_no_adapter, model_hashes
from latentvae.errors import UserError
from latentvae.losses.terms import widened
from latentvae.model.autoencoder import AutoencoderKL
from latentvae.model.posterior import Posterior


class StartingModel(nn.Module):
    """A frozen copy of a model, in the dtype of its weights: images [-1, 1] => raw means of its posterior.

    It rests in CPU memory, so that a GPU never holds a second model; with `anchor_device` encoder and quant_conv lie
    there, for they run at every step. Make it before training changes the weights, and again from the same source on
    resume (`require_same`). Nothing of it belongs in an optimizer, in DDP or in a checkpoint.

    Attributes:
        hashes: of weights, architecture and scaling.
    """

    def __init__(self, vae: AutoencoderKL, *, anchor_device: torch.device | None = None) -> None:
        """UserError where the model carries an adapter, which is no place to start from."""
        super().__init__()
        check_no_adapter(vae)
        self.hashes = model_hashes(vae)
        model = copy.deepcopy(vae).cpu().requires_grad_(False).eval()
        model.disable_gradient_checkpointing()
        self._vae: AutoencoderKL = model
        self._anchor_device = anchor_device
        self._rest()

    def _rest(self) -> None:
        self._vae.cpu()
        for part in (self._vae.encoder, self._vae.quant_conv):
            if part is not None and self._anchor_device is not None:
                part.to(self._anchor_device)

    @torch.no_grad()
    def encode_mean(self, images: Tensor) -> Tensor:
        """images [-1, 1] (B, C, H, W), on the encoder's device and in its dtype => raw means (B, c, h, w).

        The means are float32 or wider. Under the same autocast as training an unchanged encoder gives the same bits.
        """
        return Posterior(widened(self._vae.moments(images))).mean

    def forward(self, images: Tensor) -> Tensor:
        """As `encode_mean`."""
        return self.encode_mean(images)

    @contextmanager
    def like(self, vae: AutoencoderKL) -> Iterator[AutoencoderKL]:
        """Within the block the whole copy, on the device and in the memory layout of `vae`, which decide rounding.

        `vae` has the same architecture and no adapter. Afterwards the copy rests where it did.
        """
        device = next(vae.parameters()).device
        own = dict(self._vae.named_parameters())
        if own.keys() != dict(vae.named_parameters()).keys():
            raise ValueError("the model is of another architecture than the one that training started from")
        try:
            for name, parameter in vae.named_parameters():
                laid_out = torch.empty_like(parameter, dtype=own[name].dtype, device=device, requires_grad=False)
                own[name].data = laid_out.copy_(own[name])
            yield self._vae
        finally:
            self._rest()

    def to_dict(self) -> dict[str, str]:
        """The hashes, for the state of a checkpoint."""
        return asdict(self.hashes)

    def require_same(self, saved: Mapping[str, str], source: str | Path) -> None:
        """Raise a UserError unless `saved`, which `to_dict` gave when the run began, is of this very model.

        Args:
            source: where the model was loaded from (`model.start_from`), for the message.
        """
        own = self.to_dict()
        differing = [name for name in ("encoder", "decoder", "model") if saved.get(name) != own[name]]
        if differing:
            what = "scaling" if differing == ["model"] else " and ".join(name for name in differing if name != "model")
            raise UserError(
                f"model.start_from {source} is not what this run started from: its {what} changed since. Put the old "
                "file back (and the old training.parameter_dtype), or begin a new run with another --out"
            )
