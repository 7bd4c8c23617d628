"""The spine: messages -> media -> prompt -> engine -> text. :class:`AsyncLLM` for servers, :class:`LLM` for scripts.

Knows no HTTP. Everything a request needs happens in :meth:`AsyncLLM.generate`, in order; the parts are
:mod:`filmstrip.processing` (tokens and pixels) and :mod:`filmstrip.engine` (a process of its own).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import threading
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from filmstrip.config import EngineConfig, LLMConfig, MediaConfig, ProcessorConfig
from filmstrip.engine.client import EngineClient
from filmstrip.errors import InvalidRequestError
from filmstrip.processing.messages import MediaOptions, has_text, parse_media_options
from filmstrip.processing.preview import Previewer, PromptPreview, Thumbnails
from filmstrip.processing.prompt_builder import PromptBuilder
from filmstrip.processing.tasks import gather_or_cancel
from filmstrip.processing.tokenizer import StopStrings, StreamingDecoder, Tokenizer
from filmstrip.types import (
    FinishReason,
    FrameTiming,
    Modality,
    ProcessedPrompt,
    Progress,
    RequestOutput,
    SamplingParams,
    Usage,
)

T = TypeVar("T")
Messages = Sequence[Mapping[str, Any]]
_GENERATION_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class AsyncLLM:
    """A model in memory, asked from an event loop. Make one with :meth:`start`, end it with :meth:`close`."""

    def __init__(self, config: LLMConfig, prompts: PromptBuilder, engine: EngineClient) -> None:
        self.model_name = config.engine.model
        self._prompts, self._engine = prompts, engine
        eos = prompts.generation_config.get("eos_token_id")
        eos_token_ids = {*(eos if isinstance(eos, list) else [eos]), prompts.tokenizer.eos_token_id} - {None}
        self._eos_token_ids = tuple(sorted(eos_token_ids))

    @classmethod
    async def start(cls, config: LLMConfig) -> AsyncLLM:
        """Load the processor here and the weights in the engine process; raises ModelLoadError."""
        prompts = await asyncio.to_thread(PromptBuilder, config)
        getting_ready = asyncio.ensure_future(prompts.start())
        try:
            llm = cls(config, prompts, await EngineClient.start(config.engine))
        except BaseException:
            getting_ready.cancel()
            await prompts.close()
            raise
        try:
            await getting_ready
        except BaseException:
            await llm.close()
            raise
        return llm

    @property
    def max_model_len(self) -> int:
        """Longest prompt and answer together, in tokens."""
        return self._engine.info.max_model_len

    @property
    def is_alive(self) -> bool:
        """False once the engine process has ended."""
        return self._engine.is_alive

    @property
    def engine_pid(self) -> int:
        """Process id of the engine, for monitoring."""
        return self._engine.pid

    def default_sampling_params(self, **overrides: Any) -> SamplingParams:
        """The checkpoint's own sampling (``generation_config.json``), with what is given here instead."""
        theirs = self._prompts.generation_config
        ours = {name: theirs[name] for name in _GENERATION_DEFAULTS if theirs.get(name) is not None}
        if theirs.get("stop_strings"):
            ours["stop"] = theirs["stop_strings"]
        if not theirs.get("do_sample", True):
            ours["temperature"] = 0.0
        return SamplingParams(**{**ours, **overrides})

    async def generate(
        self,
        messages: Messages,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        media_io_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        media_overflow: str | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer a conversation, step by step.

        The first output comes when the prompt is ready (empty text; ``media`` and the prompt's tokens known), then one for
        each engine step that adds tokens; the last has a ``finish_reason``. Everything wrong with the request is raised
        (InvalidRequestError family) before the first output. Closing the iterator aborts the request everywhere.
        """
        request_id = request_id or uuid.uuid4().hex
        self._check_stop_token_ids(params)
        report = on_progress or _ignore
        prompt = await self._prompts.build(
            messages,
            max_model_len=self.max_model_len,
            media_io_kwargs=media_io_kwargs,
            mm_processor_kwargs=mm_processor_kwargs,
            chat_template_kwargs=chat_template_kwargs,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            media_overflow=media_overflow,
            report=report,
        )
        room = self.max_model_len - len(prompt.token_ids)
        params = dataclasses.replace(params, max_tokens=min(params.max_tokens or room, room))
        report(Progress("prefill", 0, len(prompt.token_ids)))
        continued = prompt.token_ids if continue_final_message and has_text(messages[-1]) else ()
        answer = _Answer(request_id, prompt, params, self._prompts.tokenizer, continued)
        yield answer.output("")
        stop_token_ids = () if params.ignore_eos else self._eos_token_ids
        async with contextlib.aclosing(self._engine.generate(request_id, prompt, params, stop_token_ids)) as steps:
            async for step in steps:
                output = answer.add(step.new_token_ids, step.finish_reason, step.stop_reason, step.num_cached_tokens)
                report(Progress("generate", len(answer.token_ids), params.max_tokens or 0))
                yield output
                if output.finish_reason is not None:  # a stop string was found, of which the engine knows nothing
                    return

    async def preview(self, messages: Messages, **options: Any) -> PromptPreview:
        """What an answer would look at and what it would cost, from headers alone.

        ``options`` are those of :meth:`Previewer.preview`, whose errors it raises.
        """
        return await Previewer(self._prompts).preview(messages, max_model_len=self.max_model_len, **options)

    async def thumbnails(
        self, messages: Messages, *, max_edge: int, max_thumbnails: int, **options: Any
    ) -> list[Thumbnails]:
        """Small pictures of the frames that :meth:`preview` names; see :meth:`Previewer.thumbnails`."""
        return await Previewer(self._prompts).thumbnails(
            messages,
            max_model_len=self.max_model_len,
            max_edge=max_edge,
            max_thumbnails=max_thumbnails,
            **options,
        )

    def _check_stop_token_ids(self, params: SamplingParams) -> None:
        vocab_size = self._engine.info.vocab_size
        beyond = next((token_id for token_id in params.stop_token_ids if token_id >= vocab_size), None)
        if beyond is not None:
            raise InvalidRequestError(
                f"stop_token_ids has {beyond}, but the model's vocabulary has {vocab_size} tokens",
                param="stop_token_ids",
            )

    async def stats(self) -> dict[str, Any]:
        """Counters of the engine and the media cache, for tests and monitoring."""
        engine = await self._engine.stats()
        return {**engine, **self._prompts.stats()}

    async def close(self) -> None:
        """End the engine process and release everything."""
        await self._engine.close()
        await self._prompts.close()


class _Answer:
    """The growing answer to one request: tokens in, text out, stop strings applied.

    ``continued`` are the tokens that it goes on from, if it begins no text of its own.
    """

    def __init__(
        self,
        request_id: str,
        prompt: ProcessedPrompt,
        params: SamplingParams,
        tokenizer: Tokenizer,
        continued: Sequence[int],
    ) -> None:
        self._request_id, self._prompt, self._params = request_id, prompt, params
        self._decoder = StreamingDecoder(tokenizer, skip_special_tokens=params.skip_special_tokens, continued=continued)
        self._stops = StopStrings(params.stop, include=params.include_stop_str_in_output)
        self._media_tokens = {
            modality: sum(r.length for f in prompt.features if f.modality is modality for r in f.segments)
            for modality in Modality
        }
        self._cached_tokens = 0
        self._text = ""
        self.token_ids: list[int] = []

    def add(
        self,
        new_token_ids: Sequence[int],
        finish_reason: FinishReason | None,
        stop_reason: int | None,
        num_cached_tokens: int,
    ) -> RequestOutput:
        """The answer after one more engine step."""
        self._cached_tokens = num_cached_tokens
        self.token_ids.extend(new_token_ids)
        # The token that ended the answer is counted but not shown.
        shown = list(new_token_ids)
        if finish_reason == "stop" and shown and not self._params.include_stop_str_in_output:
            shown.pop()
        delta = self._decoder.push(shown)
        if finish_reason is not None:
            delta += self._decoder.flush()
        delta, stop_string = self._stops.push(delta, last=finish_reason is not None)
        if stop_string is not None:
            return self.output(delta, "stop", stop_string)
        return self.output(delta, finish_reason, stop_reason)

    def output(
        self, delta: str, finish_reason: FinishReason | None = None, stop_reason: str | int | None = None
    ) -> RequestOutput:
        """The answer so far."""
        self._text += delta
        usage = Usage(
            prompt_tokens=len(self._prompt.token_ids),
            completion_tokens=len(self.token_ids),
            cached_tokens=self._cached_tokens,
            image_tokens=self._media_tokens[Modality.IMAGE],
            video_tokens=self._media_tokens[Modality.VIDEO],
            time_series_tokens=self._media_tokens[Modality.TIME_SERIES],
        )
        return RequestOutput(
            request_id=self._request_id,
            text=self._text,
            token_ids=list(self.token_ids),
            prompt_token_ids=self._prompt.token_ids,
            finish_reason=finish_reason,
            usage=usage,
            media=list(self._prompt.media),
            delta=delta,
            stop_reason=stop_reason,
        )


class LLM:
    """A model in memory, asked from ordinary (synchronous) code.

    ``media_io_kwargs`` and ``mm_processor_kwargs`` are the defaults of every request. ``options`` are further fields of
    :class:`EngineConfig`, :class:`MediaConfig` and :class:`ProcessorConfig`; an unknown one is a TypeError. Usable as a
    context manager; :meth:`close` ends the engine.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 16,
        media_io_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """Load ``model`` (a directory or a hub id); raises ModelLoadError."""
        defaults = parse_media_options(media_io_kwargs, mm_processor_kwargs, MediaOptions())
        engine, media, processor = _split_options(options)
        if dataclasses.replace(defaults.timing, fps=None) != FrameTiming():
            raise InvalidRequestError(
                "frames_indices, total_num_frames, duration and timestamps belong to one video, not to all",
                param="media_io_kwargs.video",
            )
        if defaults.video_decoder is not None:
            media["video_decoder"] = defaults.video_decoder
        config = LLMConfig(
            EngineConfig(
                model, device=device, dtype=dtype, max_model_len=max_model_len, max_num_seqs=max_num_seqs, **engine
            ),
            MediaConfig(video=defaults.sampling, **media),
            ProcessorConfig(image=defaults.image_pixels, video=defaults.video_pixels, **processor),
        )
        self._closed = False
        self._pid = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="filmstrip-llm", daemon=True)
        self._thread.start()
        try:
            self._llm = self._run(AsyncLLM.start(config))
        except BaseException:
            self._stop_loop()
            raise
        # More requests than the engine runs at once are prepared ahead, but not without bound: their pixels take memory.
        self._slots = asyncio.Semaphore(2 * max_num_seqs)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | None = None,
        *,
        media_io_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        media_overflow: str | None = None,
    ) -> Any:
        """Answer one conversation (a list of messages) or several (a list of such lists, answered together).

        ``sampling_params`` None means the checkpoint's own; ``media_overflow`` "fit" shows less of media that do not fit
        the context instead of refusing them. Returns a :class:`RequestOutput`, or a list of them in order.
        Raises the InvalidRequestError family for a wrong request and EngineDeadError if the engine ended.
        """
        params = sampling_params or self._llm.default_sampling_params()
        batch = isinstance(messages, list | tuple) and bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = list(messages) if batch else [messages]

        async def answer(conversation: Messages) -> RequestOutput:
            async with self._slots:
                outputs = self._llm.generate(
                    conversation,
                    params,
                    media_io_kwargs=media_io_kwargs,
                    mm_processor_kwargs=mm_processor_kwargs,
                    chat_template_kwargs=chat_template_kwargs,
                    media_overflow=media_overflow,
                )
                last = await anext(outputs)
                async for output in outputs:
                    last = output
                return last

        async def answer_all() -> list[RequestOutput]:
            return await gather_or_cancel([answer(conversation) for conversation in conversations])

        outputs = self._run(answer_all())
        return outputs if batch else outputs[0]

    def stats(self) -> dict[str, Any]:
        """Counters of the engine and the media cache."""
        return self._run(self._llm.stats())

    def close(self) -> None:
        """End the engine process; may be called twice."""
        if not self._closed and os.getpid() == self._pid:
            try:
                self._run(self._llm.close())
            finally:
                self._closed = True
                self._stop_loop()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result, run by the loop's thread, which a forked copy of this process does not have."""
        if self._closed or os.getpid() != self._pid:
            coroutine.close()
            raise RuntimeError(
                "this LLM is closed"
                if self._closed
                else "this LLM belongs to the process that was forked; make one in the new process (start method spawn)"
            )
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _split_options(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Sort options by the dataclass that has them; TypeError for one that none has."""
    split: list[dict[str, Any]] = []
    unknown = set(options)
    for section in (EngineConfig, MediaConfig, ProcessorConfig):
        names = {field.name for field in dataclasses.fields(section)} - {"model", "image", "video"}
        split.append({name: value for name, value in options.items() if name in names})
        unknown -= names
    if unknown:
        raise TypeError(f"LLM has no option {', '.join(sorted(unknown))}")
    return split


def _ignore(progress: Progress) -> None:
    """Nobody watches."""
