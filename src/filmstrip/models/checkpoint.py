"""An engine configuration in, a located and checked checkpoint out, ready for a family's class; knows no family.

Only safetensors are read and no code that comes with a checkpoint is ever run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from filmstrip.config import EngineConfig
from filmstrip.errors import ModelLoadError
from filmstrip.formats.registry import check_format
from filmstrip.models.devices import DTYPES, resolve_device, resolve_dtype
from filmstrip.models.registry import find_architecture, served_fields

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """Where a model's files are, what it is and how it is to be loaded."""

    model: str
    """A directory or a hub id."""
    revision: str | None
    architecture: str
    device: torch.device
    dtype: torch.dtype
    block_size: int | None

    def load_module(
        self, module_class: Any, *, complete: Callable[[Any, list[str]], list[str]] | None = None, **options: Any
    ) -> Any:
        """The Transformers module of ``module_class`` with this checkpoint's weights, in evaluation mode on the device.

        ``options`` go to ``from_pretrained``. ``complete`` is called with the module and the names of the weights that are
        not among the checkpoint's, sorted, if there are any; it may take them from elsewhere and returns those still
        missing. Raises :class:`ModelLoadError` when there are no safetensors, when weights are missing or of a wrong shape
        (they would stay random) or when a file cannot be read. Weights the module has no place for are named in the log.
        """
        try:
            module, info = module_class.from_pretrained(
                self.model,
                revision=self.revision or "main",
                dtype=self.dtype,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
        except Exception as error:
            raise ModelLoadError(
                f"cannot load the weights of {self.model!r}: {_summary(error)}", param="model"
            ) from error
        missing = sorted(info["missing_keys"])
        if missing and complete is not None:
            missing = complete(module, missing)
        if missing:
            raise ModelLoadError(
                f"{self.model!r} is incomplete: {len(missing)} weights of {self.architecture} are missing, among them "
                + ", ".join(missing[:3]),
                param="model",
            )
        unexpected = sorted(info["unexpected_keys"])
        if unexpected:
            logger.warning("%d weights are not used, among them %s", len(unexpected), ", ".join(unexpected[:3]))
        return module.to(self.device).eval().requires_grad_(False)


def open_checkpoint(config: EngineConfig) -> Checkpoint:
    """Find ``config.model`` (a directory or a hub id), check that it can be served and settle device and dtype.

    Raises :class:`ModelLoadError` naming what is missing: the directory, config.json, a supported architecture,
    safetensors weights, the device.
    """
    if config.block_size is not None and config.block_size < 1:
        raise ModelLoadError(f"block_size must be at least 1, not {config.block_size}", param="block_size")
    model = str(Path(config.model).expanduser()) if _is_path(config.model) else config.model
    if _is_path(model):
        _check_directory(Path(model))
    fields = _read_config(model, config.revision)
    check_format(fields, config.model)
    architecture = find_architecture(fields.get("architectures") or [], config.model)
    fields = served_fields(architecture, fields)
    if "quantization_config" in fields:
        method = fields["quantization_config"].get("quant_method", "unnamed")
        raise ModelLoadError(
            f"{config.model!r} is quantised ({method}), which is not supported; use the checkpoint in bfloat16 or float32",
            param="model",
        )
    device = resolve_device(config.device)
    return Checkpoint(
        model=model,
        revision=config.revision,
        architecture=architecture,
        device=device,
        dtype=resolve_dtype(config.dtype, _checkpoint_dtype(fields), device),
        block_size=config.block_size,
    )


def _is_path(model: str) -> bool:
    """Whether ``model`` can only be meant as a directory, or is one; a hub id is ``name`` or ``owner/name``."""
    return Path(model).expanduser().exists() or model.startswith((".", "~", "/", "\\")) or model.count("/") > 1


def _check_directory(path: Path) -> None:
    if not path.is_dir():
        what = "is not a directory" if path.exists() else "does not exist"
        raise ModelLoadError(f"model directory {str(path)!r} {what}", param="model")
    if not (path / "config.json").is_file():
        raise ModelLoadError(f"model directory {str(path)!r} has no config.json", param="model")
    if any(path.glob("*.safetensors")):
        return
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
    found = f"only {', '.join(pickled[:3])}" if pickled else "no weights"
    raise ModelLoadError(
        f"model directory {str(path)!r} has {found}; weights must be safetensors, because unpickling can run any code",
        param="model",
    )


def _read_config(model: str, revision: str | None) -> Mapping[str, Any]:
    """The fields of config.json, from the directory or the hub."""
    try:
        fields, _ = PreTrainedConfig.get_config_dict(model, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"cannot read config.json of {model!r}: {_summary(error)}", param="model") from error
    if not isinstance(fields, Mapping):
        raise ModelLoadError(f"config.json of {model!r} must hold a JSON object", param="model")
    return fields


def _checkpoint_dtype(fields: Mapping[str, Any]) -> torch.dtype:
    """The dtype a config names, at the top or for its text model; float32, PyTorch's default, if it names none."""
    text = fields.get("text_config") or {}
    names = (part.get(key) for part in (fields, text) for key in ("dtype", "torch_dtype"))
    name = next((name for name in names if name), "float32")
    name = str(name).removeprefix("torch.")
    if name not in DTYPES:
        raise ModelLoadError(
            f"config.json names the dtype {name!r}; weights must be of {', '.join(DTYPES)}", param="model"
        )
    return DTYPES[name]


def _summary(error: BaseException) -> str:
    """First lines of an error's text, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else text[:400] + "..."
