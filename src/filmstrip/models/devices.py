"""Device and dtype wishes in, what this machine computes with out; picks the attention backend; knows no checkpoint."""

from __future__ import annotations

import torch

from filmstrip.errors import ModelLoadError
from filmstrip.models.cpu_attention import CpuPagedAttention
from filmstrip.models.cpu_features import cpu_has_bfloat16_units
from filmstrip.models.cuda_attention import CudaPagedAttention
from filmstrip.models.paged_attention import AttentionShape, PagedAttention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What a model computes in, by the name that options and configs use."""


def resolve_device(name: str) -> torch.device:
    """ "auto" is the first CUDA device or else the CPU; raises :class:`ModelLoadError` for what is not there."""
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ModelLoadError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}", param="device") from None
    if device.type not in ("cpu", "cuda"):
        raise ModelLoadError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}", param="device")
    if device.type == "cuda" and (device.index or 0) >= (num_devices := torch.cuda.device_count()):
        raise ModelLoadError(
            f"device {name!r} is not here: PyTorch {torch.__version__} sees {num_devices} CUDA devices; use device=cpu "
            "or install a PyTorch built for your GPU",
            param="device",
        )
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else torch.device("cpu")


def resolve_dtype(name: str, checkpoint_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in.

    "auto" is the checkpoint's own on CUDA. On a CPU it is bfloat16 for a bfloat16 checkpoint where the CPU multiplies
    bfloat16 in hardware (AVX512-BF16 or AMX), else float32: emulated 16-bit arithmetic is several times slower than fp32.
    """
    if name == "auto":
        if device.type == "cuda":
            return checkpoint_dtype
        return torch.bfloat16 if checkpoint_dtype == torch.bfloat16 and cpu_has_bfloat16_units() else torch.float32
    if name not in DTYPES:
        raise ModelLoadError(f"dtype must be auto, {', '.join(DTYPES)}, not {name!r}", param="dtype")
    if name == "float16" and device.type == "cpu":
        raise ModelLoadError(
            "dtype float16 is served on CUDA only (CPUs emulate it slowly); on a CPU use dtype=auto, float32 or bfloat16",
            param="dtype",
        )
    return DTYPES[name]


def forbid_tf32(device: torch.device, dtype: torch.dtype) -> None:
    """Let a GPU convolve float32 in float32, in this whole process.

    Unless told otherwise, PyTorch rounds what convolutions (not other products) multiply to TF32's 10 bits, which moved
    logits of tiny models whose patches are embedded by one by up to 3e-3.
    """
    if device.type == "cuda" and dtype == torch.float32:
        torch.backends.cudnn.allow_tf32 = False


def make_attention(
    shape: AttentionShape, device: torch.device, dtype: torch.dtype, block_size: int | None
) -> PagedAttention:
    """The attention backend of ``device``; ``block_size`` None means the one that suits it."""
    if device.type == "cuda":
        return CudaPagedAttention(shape, dtype, device, block_size)
    return CpuPagedAttention(shape, dtype, block_size)
