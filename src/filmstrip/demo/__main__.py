"""The main job from end to end: a clip, a served checkpoint, questions over HTTP, and what the model saw."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai

from filmstrip.demo.checkpoint import make_qwen3_vl
from filmstrip.demo.clip import make_clip

MODEL_NAME = "filmstrip-demo"
QUESTIONS = ("What happens in this video?", "Which colour comes last?")


def main() -> None:
    """Run the demo; exits with 1 if the server does not come up."""
    arguments = _parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="filmstrip-demo-") as folder:
        clip = Path(arguments.video).resolve() if arguments.video else make_clip(Path(folder) / "clip.mp4")
        model, is_random = arguments.model, arguments.model is None
        if is_random:
            model = str(make_qwen3_vl(Path(folder) / "model"))
            print(
                "The checkpoint is made on the spot with RANDOM weights: everything below is real but the answers' sense."
            )
        with _server(model, clip.parent, arguments.start_timeout_seconds) as url:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
            for question in QUESTIONS:
                _ask(client, clip, question, arguments.num_frames)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m filmstrip.demo", description=__doc__)
    parser.add_argument("--model", help="checkpoint to serve instead of one with random weights")
    parser.add_argument("--video", help="clip to ask about instead of one made on the spot")
    parser.add_argument("--num-frames", type=int, default=8, help="frames to look at (default: %(default)s)")
    parser.add_argument("--start-timeout-seconds", type=float, default=300, help="(default: %(default)s)")
    return parser


def _ask(client: openai.OpenAI, clip: Path, question: str, num_frames: int) -> None:
    started = time.perf_counter()
    answer = client.chat.completions.create(
        model=MODEL_NAME,
        messages=[
            {
                "role": "user",
                "content": [
                    # The SDK has types for OpenAI's own parts only; video_url goes through as it is.
                    {"type": "video_url", "video_url": {"url": clip.as_uri()}},  # pyright: ignore[reportArgumentType]
                    {"type": "text", "text": question},
                ],
            }
        ],
        max_tokens=32,
        temperature=0,
        extra_body={"media_io_kwargs": {"video": {"num_frames": num_frames}}, "return_media_info": True},
    )
    seconds = time.perf_counter() - started
    usage: Any = answer.usage
    for media in (answer.model_extra or {})["media"]:
        times = ", ".join(f"{t:.2f}" for t in media["timestamps"])
        print(
            f"\nsaw      {media['num_frames']} frames of {clip.name} at {times} s, {media['width']} x {media['height']}"
        )
        print(f"         {media['num_tokens']} video tokens, {'from the cache' if media['cached'] else 'decoded now'}")
    cached = usage.prompt_tokens_details.cached_tokens
    print(f"tokens   {usage.prompt_tokens} prompt ({cached} from the prefix cache), {usage.completion_tokens} answer")
    print(f"question {question}")
    print(f"answer   {json.dumps(answer.choices[0].message.content, ensure_ascii=False)}   ({seconds:.2f} s)")


@contextlib.contextmanager
def _server(model: str, media_folder: Path, timeout_seconds: float) -> Iterator[str]:
    """A running ``filmstrip serve`` on a free port; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "filmstrip.cli.main", "serve", model, "--host", "127.0.0.1", "--port", str(port)),
        *("--served-model-name", MODEL_NAME, "--allowed-local-media-path", str(media_folder), "--log-level", "warning"),
        *("--max-model-len", "16384", "--kv-cache-gb", "0.25", "--encoder-cache-gb", "0.05"),
    ]
    process = subprocess.Popen(command, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_healthy(url, process, timeout_seconds)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            sys.exit(f"the server ended with code {process.returncode} before it was ready")
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        time.sleep(0.2)
    sys.exit(f"the server was not ready after {timeout_seconds:.0f} s")


if __name__ == "__main__":
    main()
