"""How much memory the caches get, from what was asked for and what is free; knows no requests."""

from __future__ import annotations

import logging

from filmstrip.config import EngineConfig
from filmstrip.engine.engine import EngineLimits
from filmstrip.engine.kv_cache import MAX_LIKELY_CHECKPOINTS
from filmstrip.engine.memory import free_device_bytes, free_host_bytes
from filmstrip.errors import ModelLoadError
from filmstrip.models.base import ModelInfo

logger = logging.getLogger(__name__)

GIB = 1024**3
KV_CACHE_SHARE = 0.4
"""Share of a host's free memory for keys and values if no size is given."""
ENCODER_CACHE_SHARE = 0.05
"""Share of free memory for encoded media if no size is given."""
CROSS_ATTENTION_CACHE_SHARE = 0.15
"""The same for models whose tokens attend to encoded media to the answer's end: all that running requests see is in it."""
STATE_CACHE_SHARE = 0.05
"""Share of free memory for recurrent states kept beside those of running requests if no size is given."""
MAX_RUNNING_STATES_SHARE = 0.5
"""Largest share of free memory that the states of running requests may take: the rest is for keys and values."""
MAX_NUM_BATCHED_TOKENS = {"cpu": 512, "cuda": 2048}
"""Tokens of a step if no number is given. A CPU is fully used by a few hundred: more would only make answers under way wait
longer for each chunk of a new prompt."""
_MAX_KEPT_ROUNDS = 4
"""If no size is given: so often all requests of a step may lie in the cache at full length. One round computes, the others
are prefixes kept for later questions; a small model would otherwise take memory that it can hardly fill."""
_ACTIVATIONS_PER_TOKEN = 64
_PATCHES_AT_ONCE = 16384
_VISION_VALUES_PER_PATCH = 32768
_LOGITS_COPIES = 4


def decide_limits(config: EngineConfig, info: ModelInfo) -> EngineLimits:
    """Sizes to run with; raises ModelLoadError, naming the option, if they cannot work."""
    _check(config, info)
    max_num_batched_tokens = config.max_num_batched_tokens or MAX_NUM_BATCHED_TOKENS[info.device.type]
    free = _free_bytes(config, info, max_num_batched_tokens)
    encoder_bytes = _size_encoder_cache(config, info, free)
    num_checkpoints, state_bytes = _size_states(config, info, free)
    kv_share = free - encoder_bytes - state_bytes if info.device.type == "cuda" else KV_CACHE_SHARE * free
    kv_bytes = _bytes_of(config.kv_cache_gb, kv_share)
    wanted_len = config.max_model_len or info.max_position_embeddings
    num_blocks = kv_bytes // (info.kv_bytes_per_token * info.block_size)
    if config.kv_cache_gb is None:
        num_blocks = min(num_blocks, _MAX_KEPT_ROUNDS * config.max_num_seqs * -(-wanted_len // info.block_size))
    capacity = num_blocks * info.block_size
    if config.max_model_len is not None and config.max_model_len > capacity:
        raise ModelLoadError(
            f"max_model_len {config.max_model_len} needs {config.max_model_len * info.kv_bytes_per_token / GIB:.2f} GiB of "
            f"KV cache, but there are {kv_bytes / GIB:.2f}: raise --kv-cache-gb or lower --max-model-len",
            param="max_model_len",
        )
    if capacity < 2:
        raise ModelLoadError(
            f"the KV cache of {kv_bytes / GIB:.3f} GiB does not hold one block of {info.block_size} tokens "
            f"({info.kv_bytes_per_token * info.block_size} bytes): raise --kv-cache-gb",
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
        max_num_batched_tokens=max_num_batched_tokens,
        encoder_cache_bytes=encoder_bytes,
        enable_prefix_caching=config.enable_prefix_caching,
        seed=config.seed,
        num_state_checkpoints=num_checkpoints,
    )


def _size_encoder_cache(config: EngineConfig, info: ModelInfo, free: int) -> int:
    segment_bytes = info.cross_attention_bytes_per_segment
    encoder_bytes = _bytes_of(
        config.encoder_cache_gb, (CROSS_ATTENTION_CACHE_SHARE if segment_bytes else ENCODER_CACHE_SHARE) * free
    )
    if encoder_bytes < segment_bytes:
        logger.warning(
            "the encoder cache of %.3f GiB does not hold one picture, which takes %.3f: requests with pictures will be "
            "refused (--encoder-cache-gb)",
            encoder_bytes / GIB,
            segment_bytes / GIB,
        )
    return encoder_bytes


def _size_states(config: EngineConfig, info: ModelInfo, free: int) -> tuple[int, int]:
    """How many recurrent states are kept for later prompts, and the bytes of those and the running requests' together.

    Raises ModelLoadError if the running requests' alone would leave too little for keys and values.
    """
    if info.state_bytes_per_request == 0:
        return 0, 0
    running_bytes = config.max_num_seqs * info.state_bytes_per_request
    if running_bytes > MAX_RUNNING_STATES_SHARE * free:
        raise ModelLoadError(
            f"max_num_seqs {config.max_num_seqs} needs {running_bytes / GIB:.2f} GiB for states of linear attention "
            f"({info.state_bytes_per_request} bytes each), more than {MAX_RUNNING_STATES_SHARE:.0%} of the {free / GIB:.2f} "
            "GiB that are free: lower --max-num-seqs",
            param="max_num_seqs",
        )
    num_checkpoints = 0
    if config.enable_prefix_caching:
        num_checkpoints = _bytes_of(config.state_cache_gb, STATE_CACHE_SHARE * free) // info.state_bytes_per_request
        if config.state_cache_gb is None:
            num_checkpoints = min(num_checkpoints, _MAX_KEPT_ROUNDS * MAX_LIKELY_CHECKPOINTS * config.max_num_seqs)
    return num_checkpoints, running_bytes + num_checkpoints * info.state_bytes_per_request


def _check(config: EngineConfig, info: ModelInfo) -> None:
    """Raise for numbers that mean nothing; options from Python have passed no command line."""
    for name, low, high in (
        ("max_model_len", 2, info.max_position_embeddings),
        ("max_num_seqs", 1, None),
        ("max_num_batched_tokens", 1, None),
        ("kv_cache_gb", 0, None),
        ("encoder_cache_gb", 0, None),
        ("state_cache_gb", 0, None),
        ("gpu_memory_utilization", 0, 1),
    ):
        value = getattr(config, name)
        if value is None or (value >= low and (high is None or value <= high)):
            continue
        bound = f"at least {low}" if value < low else f"at most {high}"
        of_model = ", the longest that this model was made for" if name == "max_model_len" and value > low else ""
        raise ModelLoadError(f"{name} must be {bound}{of_model}, not {value}", param=name)


def _bytes_of(gibibytes: float | None, default: float) -> int:
    return int(default if gibibytes is None else gibibytes * GIB)


def _free_bytes(config: EngineConfig, info: ModelInfo, max_num_batched_tokens: int) -> int:
    """What the caches may take. On a GPU nothing swaps, so what a step computes with is set aside first."""
    if info.device.type != "cuda":
        return free_host_bytes()
    free = free_device_bytes(info.device, config.gpu_memory_utilization)
    longest_step = max_num_batched_tokens
    if info.whole_media:  # a prompt's media go through one step, however many tokens they have
        longest_step = max(longest_step, config.max_model_len or info.max_position_embeddings)
    return max(free - _activation_bytes(info, longest_step, config.max_num_seqs), 0)


def _activation_bytes(info: ModelInfo, max_num_batched_tokens: int, max_num_seqs: int) -> int:
    """A rough upper bound of what one step computes with, from the shapes of decoders of today.

    A layer's widest moment is its gated MLP (two times about 4 hidden sizes) beside residuals and Q, K and V, with copies in
    single precision; a vision tower's is its MLP over all patches of a pass.
    """
    per_token = _ACTIVATIONS_PER_TOKEN * info.hidden_size * info.dtype.itemsize
    vision = _PATCHES_AT_ONCE * _VISION_VALUES_PER_PATCH * info.dtype.itemsize
    logits = _LOGITS_COPIES * max_num_seqs * info.vocab_size * 4
    return max_num_batched_tokens * per_token + vision + logits
