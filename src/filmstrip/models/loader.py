"""An engine configuration in, a model in memory out; knows no model family by name."""

from __future__ import annotations

import logging

import torch

from filmstrip.config import EngineConfig
from filmstrip.errors import ModelLoadError
from filmstrip.models.base import Model
from filmstrip.models.checkpoint import open_checkpoint
from filmstrip.models.cpu_features import num_usable_cores
from filmstrip.models.devices import forbid_tf32
from filmstrip.models.registry import model_class

logger = logging.getLogger(__name__)


def load_model(config: EngineConfig) -> Model:
    """Load ``config.model``; its weights are in memory and its kernels compiled on return, its KV cache is not allocated.

    Sets the number of threads of PyTorch in this process (``config.num_threads``), and for float32 on a GPU that
    convolutions do not compute in TF32. Raises :class:`ModelLoadError` if the
    checkpoint cannot be found, is not supported or is incomplete, or if its libraries cannot be imported.
    """
    if config.num_threads is not None and config.num_threads < 1:
        raise ModelLoadError(f"num_threads must be at least 1, not {config.num_threads}", param="num_threads")
    torch.set_num_threads(config.num_threads or num_usable_cores())
    checkpoint = open_checkpoint(config)
    logger.info(
        "loading %s (%s) on %s in %s", checkpoint.model, checkpoint.architecture, checkpoint.device, checkpoint.dtype
    )
    forbid_tf32(checkpoint.device, checkpoint.dtype)
    try:
        family = model_class(checkpoint.architecture)
        return family.load(checkpoint)
    except ImportError as error:
        raise ModelLoadError(_import_failure(checkpoint.architecture, error), param="model") from error


def _import_failure(architecture: str, error: ImportError) -> str:
    """Why a model's modules cannot be imported, and what to do where the usual culprit shows."""
    chain, text = error, ""
    while chain is not None:
        text += f"{chain} "
        chain = chain.__cause__ or chain.__context__
    if "torchvision" in text:
        return (
            f"{architecture} cannot be imported because the installed torchvision does not fit PyTorch "
            f"{torch.__version__}; install the matching version or uninstall torchvision (Filmstrip does not need it)"
        )
    return f"{architecture} cannot be imported: {' '.join(str(error).split())[:400]}"
