"""What the device is told before it computes."""

import warnings

import torch

from latentvae.errors import UserError, one_line
from latentvae.training.config import TrainingConfig


def set_tf32(device: torch.device, *, allowed: bool) -> None:
    """TensorFloat-32 in matrix products and convolutions on an NVIDIA GPU; nothing on other devices.

    By the flags that PyTorch has always had: Accelerate (under bf16) and torch.compile use them too, and PyTorch raises
    where they are read after `fp32_precision`, their successor, was set. Call it after the Accelerator was made.
    """
    if device.type == "cuda":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some versions recommend the successor
            torch.backends.cuda.matmul.allow_tf32 = allowed
            torch.backends.cudnn.allow_tf32 = allowed


def check_compiler(device: torch.device) -> None:
    """Raise a UserError where torch.compile cannot work on this device: it needs a C++ compiler, or Triton."""
    try:
        torch.compile(_probe)(torch.ones(8, device=device))
    except Exception as error:
        raise UserError(
            f"training.compile is true, but torch.compile does not work on {device} ({type(error).__name__}: "
            f"{one_line(error)[:200]}): install a C++ compiler (on a GPU also Triton), or set training.compile=false"
        ) from error


def _probe(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1


def resolve_precision(config: TrainingConfig, device: torch.device) -> str:
    """What `mixed_precision: auto` means on this device; any other value is returned as it is.

    A CPU gets bf16 only where it computes in it (AVX512-BF16, AMX), an old GPU fp16, MPS float32.
    """
    if config.mixed_precision == "fp16" and device.type == "cpu":  # Accelerate would compute in float32 without a word
        raise UserError("training.mixed_precision is fp16, which a CPU does not train in: give auto, bf16 or no")
    if config.mixed_precision != "auto":
        return config.mixed_precision
    if config.parameter_dtype == "float64":
        return "no"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu":
        return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "no"
    return "no"
