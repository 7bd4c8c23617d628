"""Requests in, tokens out, one :meth:`Engine.step` at a time: schedule, run, sample, update. Synchronous; no threads."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, cast

import numpy as np
import torch

from filmstrip.engine.encoder_cache import EncoderCache
from filmstrip.engine.kv_cache import KVCache
from filmstrip.engine.model_runner import ModelRunner
from filmstrip.engine.request import Request
from filmstrip.engine.sampler import SamplingState, sample
from filmstrip.engine.scheduler import Scheduler
from filmstrip.engine.state_pool import StatePool
from filmstrip.errors import ContextLengthError, FilmstripError, InvalidRequestError
from filmstrip.models.base import CrossAttentionModel, Model, ModelInfo, RecurrentModel, SeenMedia
from filmstrip.types import FinishReason, ProcessedPrompt, SamplingParams

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class EngineLimits:
    """Sizes the engine runs with, all decided."""

    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    encoder_cache_bytes: int
    enable_prefix_caching: bool = True
    seed: int = 0
    num_state_checkpoints: int = 0
    """Recurrent states kept beside those of running requests, for prompts that begin alike."""


@dataclasses.dataclass(frozen=True)
class StepOutput:
    """What one step added to a request. ``error`` is set, and nothing else comes, if the request failed."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    error: str | None = None


class Engine:
    """Continuous batching over one model."""

    def __init__(self, model: Model, limits: EngineLimits) -> None:
        """Allocate the KV cache and, for a model that has them, recurrent states."""
        self.model, self.limits = model, limits
        model.allocate_kv_cache(limits.num_blocks)
        self.cache = KVCache(
            limits.num_blocks,
            model.info.block_size,
            enable_prefix_caching=limits.enable_prefix_caching,
            states=_allocate_states(model, limits),
            whole_media=model.info.whole_media,
        )
        encoder_cache = EncoderCache(limits.encoder_cache_bytes, model.info.cross_attention_bytes_per_segment)
        self.scheduler = Scheduler(
            self.cache,
            encoder_cache,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            whole_segments=model.info.whole_segments,
            whole_media=model.info.whole_media,
        )
        self.runner = ModelRunner(model, encoder_cache)
        self._seen_media = _seen_media(model)
        self._requests: dict[str, Request] = {}
        self._sampling: dict[str, SamplingState] = {}
        self._num_arrived = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._requests)

    def add_request(
        self, request_id: str, prompt: ProcessedPrompt, params: SamplingParams, stop_token_ids: tuple[int, ...] = ()
    ) -> None:
        """Queue a request; raises InvalidRequestError or ContextLengthError if it can never be answered.

        ``stop_token_ids`` are the model's own (end of sequence); ``params.ignore_eos`` makes nothing of them.
        ValueError means that the prompt contradicts itself, which is its maker's fault and not the user's.
        """
        num_tokens = len(prompt.token_ids)
        if request_id in self._requests:
            raise InvalidRequestError(f"request id {request_id!r} is in use", param="request_id")
        if num_tokens == 0:
            raise InvalidRequestError("the prompt is empty", param="messages")
        if num_tokens >= self.limits.max_model_len:
            raise ContextLengthError(
                f"the prompt has {num_tokens} tokens, but prompt and answer together may have "
                f"{self.limits.max_model_len} (--max-model-len)",
                param="messages",
            )
        capacity = self.limits.num_blocks * self.model.info.block_size
        wanted = min(num_tokens + (params.max_tokens or self.limits.max_model_len), self.limits.max_model_len)
        if wanted > capacity:
            raise ContextLengthError(
                f"prompt and answer may need {wanted} tokens, but the KV cache holds {capacity}: raise --kv-cache-gb or "
                f"lower max_tokens",
                param="max_tokens",
            )
        _check_prompt(prompt, self.model.info.vocab_size)
        ends = frozenset() if params.ignore_eos else frozenset(stop_token_ids)
        request = Request(request_id, prompt, params, ends, self._num_arrived + 1, self._seen_media)
        self._check_media(request)
        request.cache_salt = _cache_salt(request, self.model.info)
        self._num_arrived += 1
        seed = self.limits.seed + self._num_arrived
        self._sampling[request_id] = SamplingState(params, prompt.token_ids, self.model.info.vocab_size, seed)
        self._requests[request_id] = request
        self.scheduler.add(request)

    def _check_media(self, request: Request) -> None:
        """Raise InvalidRequestError if the media that a request attends to never have room at the same time."""
        needed = len(request.attended_keys) * self.model.info.cross_attention_bytes_per_segment
        if needed > self.limits.encoder_cache_bytes:
            raise InvalidRequestError(
                f"the {len(request.attended_keys)} different media of the prompt need {needed} bytes while it is answered, "
                f"but the encoder cache holds {self.limits.encoder_cache_bytes}: raise --encoder-cache-gb or send fewer",
                param="messages",
            )

    def abort(self, request_id: str) -> None:
        """Forget a request and free what it holds; unknown ids are ignored (it may just have ended)."""
        if request_id in self._requests:
            self._remove(self._requests[request_id])

    def step(self) -> list[StepOutput]:
        """Run one batch; the outputs of requests that got a token or failed.

        Raises torch.AcceleratorError if the device is broken beyond this step; the engine is of no use then.
        """
        scheduled = self.scheduler.schedule()
        try:
            failed = self._encode(scheduled)
            if not scheduled:
                return failed
            try:
                if self.cache.states is not None:
                    self.runner.copy_states(self.cache.states.take_copies())
                logits, sampled = self.runner.forward(scheduled)
                tokens = sample(logits, [self._sampling[request.request_id] for request in sampled])
            except torch.AcceleratorError:
                raise  # the device answers nothing any more: better no engine than one that fails everything
            except Exception as error:
                logger.exception("a forward pass failed")
                self.runner.recover()
                return failed + [self._fail(request, f"the model failed: {_cause(error)}") for request in scheduled]
        finally:
            self.runner.encoder_cache.release()
        for request, num_tokens in scheduled.items():
            before = request.num_computed_tokens
            request.num_computed_tokens += num_tokens
            self.cache.publish(request, before)
            self._keep_state(request)
        return failed + [self._extend(request, token) for request, token in zip(sampled, tokens, strict=True)]

    def stats(self) -> dict[str, Any]:
        """Counters, for tests and monitoring."""
        encoder = self.runner.encoder_cache
        return {
            "num_blocks": self.cache.pool.num_blocks,
            "num_allocated_blocks": self.cache.pool.num_allocated,
            "num_free_blocks": self.cache.pool.num_free,
            "block_size": self.cache.block_size,
            "num_running": len(self.scheduler.running),
            "num_waiting": len(self.scheduler.waiting),
            "num_preemptions": self.scheduler.num_preemptions,
            "prefix_cache_queried_tokens": self.cache.num_queried_tokens,
            "prefix_cache_hit_tokens": self.cache.num_hit_tokens,
            "num_kept_states": 0 if self.cache.states is None else self.cache.states.num_kept,
            "encoder_cache_bytes": encoder.num_bytes,
            "encoder_cache_hits": encoder.num_hits,
            "encoder_cache_misses": encoder.num_misses,
            "encoded_segments": self.runner.num_encoded_segments,
        }

    def check_integrity(self) -> None:
        """Raise AssertionError unless every block and every state is accounted for (for tests)."""
        requests = self._requests.values()
        self.cache.pool.check_integrity([request.block_table for request in requests])
        self.runner.encoder_cache.check_integrity(request.attended_keys for request in self.scheduler.running)
        if self.cache.states is not None:
            slots = [request.state_slot for request in requests if request.state_slot is not None]
            assert len(slots) == len(self.scheduler.running), "a running request has no state, or a waiting one has"
            self.cache.states.check_integrity(slots)

    def _encode(self, scheduled: dict[Request, int]) -> list[StepOutput]:
        """Encode what the step shows; a request whose media cannot be encoded fails alone and leaves ``scheduled``."""
        failed = []
        for request, num_tokens in list(scheduled.items()):
            try:
                self.runner.encode(request, num_tokens)
            except torch.AcceleratorError:
                raise
            except Exception as error:
                logger.exception("encoding media failed")
                self.runner.recover()
                del scheduled[request]
                failed.append(self._fail(request, f"the media could not be encoded: {_cause(error)}"))
        return failed

    def _keep_state(self, request: Request) -> None:
        """Copy the request's state aside where later prompts may begin with what is computed of this one."""
        target = self.cache.keep_state(request)
        if target is not None and request.state_slot is not None:
            self.runner.copy_states([(request.state_slot, target)])

    def _extend(self, request: Request, token: int | None) -> StepOutput:
        if token is None:
            # Whatever is wrong may stand in the caches: let nobody else find it there.
            self.cache.disown(request)
            self.runner.drop_media(request)
            return self._fail(request, "the model gave logits that are not numbers")
        request.token_ids.append(token)
        self._sampling[request.request_id].observe(token)
        finish_reason, stop_reason = request.finish_reason(self.limits.max_model_len)
        if finish_reason is not None:
            self._remove(request)
        elif (salt := _cache_salt(request, self.model.info)) != request.cache_salt:
            # What is computed of it is of no use from here on.
            request.cache_salt, request.block_hashes = salt, []
            self.scheduler.restart(request)
        return StepOutput(request.request_id, [token], finish_reason, stop_reason, request.num_cached_tokens)

    def _fail(self, request: Request, message: str) -> StepOutput:
        self._remove(request)
        return StepOutput(request.request_id, [], "abort", error=message)

    def _remove(self, request: Request) -> None:
        self.scheduler.remove(request)
        del self._requests[request.request_id]
        del self._sampling[request.request_id]


def _cache_salt(request: Request, info: ModelInfo) -> bytes:
    """Which of the model's ways to compute text the request takes now."""
    longest = info.original_max_position_embeddings
    with_adapter = info.has_media_adapter and bool(request.segments)
    is_long = longest is not None and len(request.token_ids) > longest
    return (b"|adapter" if with_adapter else b"") + (b"|long" if is_long else b"")


def _allocate_states(model: Model, limits: EngineLimits) -> StatePool | None:
    """A state for each running request and the kept ones; None for a model without."""
    if model.info.state_bytes_per_request == 0:
        return None
    states = StatePool(limits.max_num_seqs, limits.num_state_checkpoints if limits.enable_prefix_caching else 0)
    cast(RecurrentModel, model).allocate_states(states.num_slots)
    return states


def _seen_media(model: Model) -> SeenMedia | None:
    """The model's rule if its tokens attend to media beside the prompt."""
    if model.info.cross_attention_bytes_per_segment == 0:
        return None
    return cast(CrossAttentionModel, model).seen_media


def _cause(error: Exception) -> str:
    """What to say of an error to whoever sent the request; libraries' own words may name files and addresses."""
    if isinstance(error, FilmstripError):
        return error.message
    words = str(error).lower()  # on a CPU PyTorch has no type of its own for it
    if (
        isinstance(error, (MemoryError, torch.OutOfMemoryError))
        or "allocate memory" in words
        or "out of memory" in words
    ):
        return "out of memory (lower --max-num-batched-tokens, --kv-cache-gb or --encoder-cache-gb)"
    return f"{type(error).__name__}; the server's log says more"


def _check_prompt(prompt: ProcessedPrompt, vocab_size: int) -> None:
    """Raise what would otherwise go wrong in a forward pass, where it would fail all requests of the step."""
    token_ids = np.asarray(prompt.token_ids, np.int64)
    is_text = np.ones(len(token_ids), bool)
    end = 0
    for segment in sorted((s for f in prompt.features for s in f.segments), key=lambda segment: segment.offset):
        if segment.offset < end or segment.length < 1 or segment.end > len(token_ids):
            raise ValueError(f"media segment {segment} does not fit a prompt of {len(token_ids)} tokens up to {end}")
        end = segment.end
        is_text[segment.offset : end] = False
    for feature in prompt.features:
        num_rows, num_segments, grids = feature.patches.shape[0], len(feature.segments), feature.segment_grids
        if grids:
            if len(grids) != num_segments or min(map(min, grids)) < 1 or sum(h * w for h, w in grids) != num_rows:
                raise ValueError(f"{num_rows} patch rows are not {num_segments} segments with the grids {grids!r:.200}")
        elif not num_segments or num_rows % num_segments:
            raise ValueError(f"{num_rows} patch rows are not {num_segments} equal segments")
    if prompt.positions is not None and prompt.positions.shape != (3, len(token_ids)):
        raise ValueError(f"positions have shape {prompt.positions.shape}, not (3, {len(token_ids)})")
    wrong = is_text & ((token_ids < 0) | (token_ids >= vocab_size))
    if wrong.any():
        raise InvalidRequestError(
            f"token id {token_ids[wrong][0]} of the prompt is not in the vocabulary of {vocab_size} tokens",
            param="messages",
        )
