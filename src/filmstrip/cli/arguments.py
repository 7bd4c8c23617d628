"""The command line's grammar: commands, their flags, and the settings these make; loads no model and no torch."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import math
import os
from collections.abc import Sequence
from typing import Any

from filmstrip.cli.options import UsageError, add_flags, flag_name, given_flags, read_flags
from filmstrip.config import (
    API_KEY_VARIABLE,
    VIDEO_DECODERS,
    EngineConfig,
    LLMConfig,
    MediaConfig,
    ProcessorConfig,
    ServerConfig,
)
from filmstrip.errors import InvalidRequestError
from filmstrip.processing.messages import MediaOptions, parse_media_options
from filmstrip.types import FrameSampling, FrameTiming, MediaItem, Modality, SamplingParams

_CHOICES = {
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "video_prompt_form": ("auto", "nested", "flat"),
    "video_decoder": VIDEO_DECODERS,
    "allowed_video_decoders": VIDEO_DECODERS,
    "log_level": ("debug", "info", "warning", "error"),
}
_ALIASES = {"max_video_duration_seconds": "--max-video-duration"}
"""Shorter names of flags."""
_TIME_ALIASES = {"start_seconds": "--start", "end_seconds": "--end"}
_ANSWER_FLAGS = frozenset({"seed"})
"""Flags of ``chat`` that are about its answers and not, as in ``serve``, about the engine."""
_REQUEST_NAMES = {"start_seconds": "start", "end_seconds": "end"}
"""Names of FrameSampling's fields in requests, where they differ."""
_SMALLEST_GB = 0.001
_BOUNDS = {
    "block_size": (1, math.inf),
    "body_idle_timeout_seconds": (0.1, math.inf),
    "connect_timeout_seconds": (0.1, math.inf),
    "decode_timeout_seconds": (0.1, math.inf),
    "download_cache_gb": (0, math.inf),
    "drain_timeout_seconds": (0, math.inf),
    "encoder_cache_gb": (_SMALLEST_GB, math.inf),
    "fetch_timeout_seconds": (0.1, math.inf),
    "gpu_memory_utilization": (0.01, 1.0),
    "keep_alive_seconds": (0.1, math.inf),
    "kv_cache_gb": (_SMALLEST_GB, math.inf),
    "max_body_bytes": (1, math.inf),
    "max_content_parts": (1, math.inf),
    "max_decode_memory_gb": (0.05, math.inf),
    "max_image_pixels": (1, math.inf),
    "max_items_per_request": (0, math.inf),
    "max_media_bytes": (1, math.inf),
    "max_model_len": (1, math.inf),
    "max_num_batched_tokens": (1, math.inf),
    "max_num_seqs": (1, math.inf),
    "max_redirects": (0, math.inf),
    "max_time_series_channels": (1, math.inf),
    "max_time_series_values": (1, math.inf),
    "max_video_duration_seconds": (0.001, math.inf),
    "max_video_frames": (1, math.inf),
    "media_cache_gb": (0, math.inf),
    "num_decode_threads": (1, math.inf),
    "num_threads": (1, math.inf),
    "port": (0, 65535),
    "state_cache_gb": (0, math.inf),
}


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """What the command line says; ``command`` names the command. Prints and exits for --help, --version and errors."""
    parser = argparse.ArgumentParser(prog="filmstrip", description="Ask models about videos and images.")
    version = importlib.metadata.version("filmstrip")
    parser.add_argument("--version", action="version", version=f"filmstrip {version}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (help_text, usage, add_to) in _COMMANDS.items():
        command = commands.add_parser(name, help=help_text, usage=usage, allow_abbrev=False)
        command.set_defaults(command=name)
        add_to(command)
    if argv and argv[0] in commands.choices and "--" not in argv:  # which only the other way knows
        # Unlike subparsers, this lets a question stand behind flags: chat MODEL --video clip.mp4 "What happens?"
        return commands.choices[argv[0]].parse_intermixed_args(argv[1:])
    return parser.parse_args(argv)


def server_config(arguments: argparse.Namespace) -> ServerConfig:
    """Settings of ``filmstrip serve``. Local files are closed but for ``--allowed-local-media-path``."""
    llm = _llm_config(arguments, allow_local_files=False)
    config = read_flags(arguments, ServerConfig, llm=llm)
    api_key = config.api_key or os.environ.get(API_KEY_VARIABLE)
    return dataclasses.replace(config, api_key=api_key or None)


def chat_config(arguments: argparse.Namespace) -> LLMConfig:
    """Settings of ``filmstrip chat``: local files are open, they are the user's own."""
    return _llm_config(arguments, allow_local_files=True, skip_engine=_ANSWER_FLAGS)


def chat_sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fields of SamplingParams given as flags, checked; the rest is for the model to say."""
    given = given_flags(arguments, SamplingParams)
    try:
        SamplingParams(**given)
    except InvalidRequestError as error:
        param = error.param or ""
        raise UsageError(error.message.replace(param, flag_name(param))) from None
    return given


def chat_media_io_kwargs(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """``media_io_kwargs`` of the flags that say which frames to look at, checked."""
    given = given_flags(arguments, FrameSampling)
    if not given:
        return None
    kwargs = {"video": {_REQUEST_NAMES.get(name, name): value for name, value in given.items()}}
    try:
        parse_media_options(kwargs, None, MediaOptions())
    except InvalidRequestError as error:
        flags = {f"media_io_kwargs.video.{_REQUEST_NAMES.get(name, name)}": flag_name(name) for name in given}
        param = error.param or ""
        raise UsageError(error.message.replace(param, flags.get(param, param))) from None
    return kwargs


def chat_media(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Content parts of ``--video`` and ``--image``, in the order given. Raises UsageError for a file that is not there."""
    parts = []
    for kind, url in arguments.media:
        if "://" not in url and not url.startswith("data:") and not os.path.isfile(url):
            raise UsageError(f"argument --{kind}: there is no file {url}")
        parts.append({"type": f"{kind}_url", f"{kind}_url": {"url": url}})
    return parts


def inspect_config(arguments: argparse.Namespace) -> LLMConfig:
    """Settings of ``filmstrip inspect``; its ``engine.model`` is empty if no model was named.

    Raises UsageError for what only a named model has.
    """
    for name in ("revision", "chat_template"):
        if hasattr(arguments, name) and not arguments.model:
            raise UsageError(f"argument {flag_name(name)}: needs --model")
    pixels = arguments.mm_processor_kwargs or MediaOptions()
    return LLMConfig(
        EngineConfig(arguments.model or "", **given_flags(arguments, EngineConfig, skip={"model"})),
        read_flags(arguments, MediaConfig, allow_local_files=True, allowed_local_media_path=None),
        read_flags(arguments, ProcessorConfig, image=pixels.image_pixels, video=pixels.video_pixels),
    )


def inspect_item(arguments: argparse.Namespace) -> MediaItem:
    """The item to inspect, as it would stand in a request. Raises UsageError for a file that is not there."""
    modality, url = Modality.IMAGE if arguments.image else Modality.VIDEO, arguments.source
    if "://" not in url and not url.startswith("data:") and not os.path.isfile(url):
        raise UsageError(f"there is no file {url}")
    options = parse_media_options(chat_media_io_kwargs(arguments), None, MediaOptions())
    pixels = (arguments.mm_processor_kwargs or MediaOptions()).pixels(modality)
    return MediaItem(modality, url=url, sampling=options.sampling, timing=options.timing, pixels=pixels)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.description = "Serve a model over an OpenAI-compatible HTTP API."
    _add_model(parser)
    server = parser.add_argument_group("server")
    add_flags(server, ServerConfig, skip={"llm"}, choices=_CHOICES, bounds=_BOUNDS)
    _add_llm_flags(parser, skip_media=frozenset({"allow_local_files"}))


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Ask a model about videos and images. Without a question, ask as often as you like: Ctrl-C ends an answer, "
        "/exit or Ctrl-D ends the conversation. The answer goes to standard output, everything else to standard error."
    )
    _add_model(parser)
    parser.add_argument("question", nargs="?", help="What to ask; asked for if not given")
    conversation = parser.add_argument_group("conversation")
    parser.set_defaults(media=[])
    conversation.add_argument(
        "--video", action=_AppendMedia, metavar="FILE_OR_URL", help="A video to look at; repeatable"
    )
    conversation.add_argument(
        "--image", action=_AppendMedia, metavar="FILE_OR_URL", help="An image to look at; repeatable"
    )
    conversation.add_argument("--system", metavar="TEXT", help="A system message to begin with")
    add_flags(parser.add_argument_group("frames of the videos"), FrameSampling)
    answer = parser.add_argument_group(
        "answer", "What is not said here is as the checkpoint's generation_config.json says."
    )
    add_flags(answer, SamplingParams, show_defaults=False)
    closed_only = frozenset({"allow_local_files", "allowed_local_media_path"})
    _add_llm_flags(parser, skip_engine=_ANSWER_FLAGS, skip_media=closed_only)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Show what a model would see of a video: frames, their times, sizes, tokens. No weights are loaded. Without "
        "--model, the settings are those that Qwen3-VL was published with."
    )
    parser.add_argument(
        "source", metavar="FILE_OR_URL", help="A path, file://, http://, https:// or data: URL, as video_url takes it"
    )
    parser.add_argument("--image", action="store_true", help="It is a picture, as image_url takes it")
    parser.add_argument("--model", metavar="MODEL", help="Directory of a checkpoint, or its id on the Hugging Face hub")
    engine_flags = {"revision", "max_model_len"}
    others = {field.name for field in dataclasses.fields(EngineConfig)} - engine_flags
    add_flags(parser, EngineConfig, skip=others, bounds=_BOUNDS)
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="Print JSON")
    output.add_argument("--sheet", metavar="FILE.png", help="Write a contact sheet: all frames with their times")
    output.add_argument(
        "--html", metavar="FILE.html", help="Write a page with facts and frames that needs no other file"
    )
    add_flags(parser.add_argument_group("frames"), FrameSampling, aliases=_TIME_ALIASES)
    media = parser.add_argument_group("media")
    unused = {"video", "limit_mm_per_prompt", "max_items_per_request", "allow_local_files", "allowed_local_media_path"}
    unused |= {"media_cache_gb", "download_cache_gb", "allowed_video_decoders"}
    add_flags(media, MediaConfig, skip=unused, choices=_CHOICES, bounds=_BOUNDS, aliases=_ALIASES)
    _add_processor_flags(parser)


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.description = "List the architectures that can be served, and the media that each takes."
    parser.add_argument("--json", action="store_true", help="Print JSON")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Ask the small model that comes with Filmstrip three questions about clips of coloured shapes, then leave its page "
        "open for yours."
    )
    parser.add_argument("--once", action="store_true", help="End after the three answers")
    only = {"host", "port"}
    others = {field.name for field in dataclasses.fields(ServerConfig)} - only
    address = parser.add_argument_group("server", "Without these, a free port of this machine only.")
    add_flags(address, ServerConfig, skip=others, bounds=_BOUNDS, show_defaults=False)
    parser.set_defaults(host="127.0.0.1", port=0)
    parser.add_argument("--model", metavar="MODEL", help="Checkpoint to ask instead of the bundled one")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Directory of a checkpoint, or its id on the Hugging Face hub")


def _add_llm_flags(
    parser: argparse.ArgumentParser, *, skip_engine: frozenset[str] = frozenset(), skip_media: frozenset[str]
) -> None:
    engine = parser.add_argument_group("engine")
    add_flags(engine, EngineConfig, skip={"model"} | skip_engine, choices=_CHOICES, bounds=_BOUNDS)
    media = parser.add_argument_group("media")
    special = {"video", "limit_mm_per_prompt"}
    add_flags(media, MediaConfig, skip=special | skip_media, choices=_CHOICES, bounds=_BOUNDS, aliases=_ALIASES)
    media.add_argument(
        "--limit-mm-per-prompt",
        type=_limit_mm_per_prompt,
        default={},
        metavar="JSON",
        help='Most items of a modality in one request, e.g. \'{"image": 8, "video": 2}\'',
    )
    media.add_argument(
        "--media-io-kwargs",
        type=_media_io_kwargs,
        metavar="JSON",
        help='Frames to look at unless a request says more, e.g. \'{"video": {"fps": 1, "num_frames": 64}}\'',
    )
    _add_processor_flags(parser)


def _add_processor_flags(parser: argparse.ArgumentParser) -> None:
    processor = parser.add_argument_group("processor")
    add_flags(processor, ProcessorConfig, skip={"image", "video"}, choices=_CHOICES)
    processor.add_argument(
        "--mm-processor-kwargs",
        type=_mm_processor_kwargs,
        metavar="JSON",
        help='Size limits unless a request says more, e.g. \'{"video": {"max_pixels": 8000000}}\'',
    )


def _llm_config(
    arguments: argparse.Namespace, *, allow_local_files: bool, skip_engine: frozenset[str] = frozenset()
) -> LLMConfig:
    path = getattr(arguments, "allowed_local_media_path", None)
    if path is not None and not os.path.isdir(path):
        raise UsageError(f"argument --allowed-local-media-path: there is no directory {path}")
    sampling = (arguments.media_io_kwargs or MediaOptions()).sampling
    pixels = arguments.mm_processor_kwargs or MediaOptions()
    return LLMConfig(
        EngineConfig(arguments.model, **given_flags(arguments, EngineConfig, skip={"model"} | skip_engine)),
        read_flags(
            arguments,
            MediaConfig,
            allow_local_files=allow_local_files,
            video=sampling,
            limit_mm_per_prompt=arguments.limit_mm_per_prompt,
        ),
        read_flags(arguments, ProcessorConfig, image=pixels.image_pixels, video=pixels.video_pixels),
    )


class _AppendMedia(argparse.Action):
    """Collects videos and images in one list, so that their order is kept."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        namespace.media = [*namespace.media, (self.dest, values)]


def _media_io_kwargs(text: str) -> MediaOptions:
    options = _media_options(_json_object(text), None)
    if dataclasses.replace(options.timing, fps=None) != FrameTiming():
        raise argparse.ArgumentTypeError(
            "frames_indices, total_num_frames, duration and timestamps belong to one video, not to all"
        )
    if options.video_decoder is not None:
        raise argparse.ArgumentTypeError("the server's own decoder is chosen with --video-decoder")
    return options


def _mm_processor_kwargs(text: str) -> MediaOptions:
    return _media_options(None, _json_object(text))


def _media_options(media_io_kwargs: Any, mm_processor_kwargs: Any) -> MediaOptions:
    try:
        return parse_media_options(media_io_kwargs, mm_processor_kwargs, MediaOptions())
    except InvalidRequestError as error:
        raise argparse.ArgumentTypeError(error.message) from None


def _limit_mm_per_prompt(text: str) -> dict[str, int]:
    limits = _json_object(text)
    for name, limit in limits.items():
        if name not in set(map(str, Modality)):
            raise argparse.ArgumentTypeError(
                f"there is no modality {name!r}; there are {', '.join(map(str, Modality))}"
            )
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
            raise argparse.ArgumentTypeError(f"the limit of {name} must be an integer >= 0, not {limit!r}")
    return limits


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except RecursionError:
        raise argparse.ArgumentTypeError("nested too deep") from None
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, not {text:.80}")
    return value


_COMMANDS = {
    "serve": ("serve a model over HTTP", "%(prog)s MODEL [options]", _add_serve),
    "chat": ("ask a model in the terminal", '%(prog)s MODEL [options] ["question"]', _add_chat),
    "inspect": ("show what a model would see of a video", "%(prog)s FILE_OR_URL [options]", _add_inspect),
    "models": ("list the models that can be served", None, _add_models),
    "demo": ("ask the bundled model about bundled clips", None, _add_demo),
}
"""Help, usage and what adds the flags, by command."""
