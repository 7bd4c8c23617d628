"""How much memory the caches get, from what was asked for and what is free; knows no requests."""

from __future__ import annotations

import logging

import psutil
import torch

from filmstrip.config import EngineConfig
from filmstrip.engine.engine import EngineLimits
from filmstrip.errors import ModelLoadError
from filmstrip.models.base import ModelInfo

logger = logging.getLogger(__name__)

GIB = 1024**3
KV_CACHE_SHARE = 0.4
"""Share of a host's free memory for keys and values if no size is given."""
ENCODER_CACHE_SHARE = 0.05
"""Share of free memory for encoded media if no size is given."""


def decide_limits(config: EngineConfig, info: ModelInfo) -> EngineLimits:
    """Sizes to run with; raises ModelLoadError, naming the option, if they cannot work."""
    free = _free_bytes(config, info)
    encoder_bytes = int(
        ENCODER_CACHE_SHARE * free if config.encoder_cache_gb is None else config.encoder_cache_gb * GIB
    )
    if config.kv_cache_gb is not None:
        kv_bytes = int(config.kv_cache_gb * GIB)
    elif info.device.type == "cuda":
        kv_bytes = free - encoder_bytes
    else:
        kv_bytes = int(KV_CACHE_SHARE * free)
    block_bytes = info.kv_bytes_per_token * info.block_size
    wanted_len = config.max_model_len or info.max_position_embeddings
    # More blocks than all sequences of a step can fill would never be used.
    most_blocks = config.max_num_seqs * -(-wanted_len // info.block_size)
    num_blocks = min(kv_bytes // block_bytes, most_blocks)
    capacity = num_blocks * info.block_size
    if config.max_model_len is not None and config.max_model_len > capacity:
        raise ModelLoadError(
            f"max_model_len {config.max_model_len} needs {config.max_model_len * info.kv_bytes_per_token / GIB:.2f} GiB of "
            f"KV cache, but there are {kv_bytes / GIB:.2f}: raise --kv-cache-gb or lower --max-model-len",
            param="max_model_len",
        )
    if capacity < 2:
        raise ModelLoadError(
            f"the KV cache of {kv_bytes / GIB:.3f} GiB does not hold one block of {block_bytes} bytes; raise --kv-cache-gb",
            param="kv_cache_gb",
        )
    max_model_len = min(wanted_len, capacity)
    if max_model_len < wanted_len:
        logger.warning(
            "the KV cache holds %d tokens, so prompt and answer together may have %d instead of the model's %d "
            "(--kv-cache-gb)",
            capacity,
            max_model_len,
            wanted_len,
        )
    return EngineLimits(
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        encoder_cache_bytes=encoder_bytes,
        enable_prefix_caching=config.enable_prefix_caching,
        seed=config.seed,
    )


def _free_bytes(config: EngineConfig, info: ModelInfo) -> int:
    if info.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(info.device)
        return max(int(total * config.gpu_memory_utilization) - (total - free), 0)
    return psutil.virtual_memory().available
