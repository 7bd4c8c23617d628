"""Concurrent chats about videos: Filmstrip against ``transformers serve`` and ``generate``.

Each client has a clip of its own, asks one question about it, then a second one. Every answer has the same number of tokens,
every clip the same frames; clips differ in their bytes, so that nothing is known before the first question. All systems run
the same random checkpoint in fp32 on the same cores, one at a time, in turns. ``generate`` answers one question after the
other, so it is measured with one client only.

    python benchmarks/chat.py --peers-python PEERS/bin/python
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from importlib.metadata import version
from pathlib import Path

import openai

from filmstrip.demo.checkpoint import make_qwen3_vl

RESULTS = Path(__file__).parent / "results" / "chat.json"
NUM_FRAMES, CLIP_FRAMES = 16, 241  # 240 / 15 is whole: truncated or rounded, both systems take the same frames
QUESTIONS = ("What happens in this video?", "Which object moves last, and where to?")
SIZES = {
    "full": {
        "text": {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 12, "num_attention_heads": 12,
                 "num_key_value_heads": 4, "head_dim": 64,
                 "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [12, 10, 10],
                                     "mrope_interleaved": True}},
        "vision": {"depth": 8, "hidden_size": 384, "intermediate_size": 1536, "num_heads": 6,
                   "deepstack_visual_indexes": [2, 4, 6]},
    },
    "quick": {"text": {}, "vision": {}},
}  # fmt: skip


class Client:
    """Asks one OpenAI-compatible server."""

    def __init__(self, url, model, extra_body):
        self._client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
        self._model, self._extra_body = model, extra_body

    async def ask(self, clip, question, max_tokens):
        """Seconds to the first token and altogether, and the answer."""
        content = [{"type": "video_url", "video_url": {"url": str(clip)}}, {"type": "text", "text": question}]
        started = time.perf_counter()
        stream = await self._client.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": content}],
            max_tokens=max_tokens,
            temperature=0,
            stream=True,
            extra_body=self._extra_body,
        )
        first, text = None, ""
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.perf_counter() - started
                text += chunk.choices[0].delta.content
        return {"ttft_seconds": first, "seconds": time.perf_counter() - started, "text": text}


@contextlib.contextmanager
def running(command, cores, url=None, **options):
    """A process on ``cores``, ended afterwards; waits until ``url`` answers."""
    environment = os.environ | {
        "OMP_NUM_THREADS": str(len(cores)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    pinned = ["taskset", "-c", ",".join(map(str, cores)), *map(str, command)]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(pinned, env=environment, stderr=log, **{"stdout": log, **options})
        try:
            deadline = time.monotonic() + 180
            while url and not _answers(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(f"{command[:3]} did not start:\n{log.read()[-3000:]}")
                time.sleep(0.3)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(url):
    with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
        urllib.request.urlopen(f"{url}/health", timeout=2).close()
        return True
    return False


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def make_clip(path, size):
    """H.264 with a silent sound track (``transformers serve`` insists on one); 24 frames per second."""
    subprocess.run(
        ["ffmpeg", "-v", "error", "-y", "-f", "lavfi", "-i", f"testsrc2=s={size}:r=24",
         "-f", "lavfi", "-i", "anullsrc=r=16000:cl=mono", "-frames:v", str(CLIP_FRAMES), "-shortest",
         "-vf", "noise=alls=8:allf=t", "-c:v", "libx264", "-preset", "veryfast", "-g", "48", "-bf", "3",
         "-pix_fmt", "yuv420p", "-c:a", "aac", str(path)],
        check=True,
    )  # fmt: skip
    return path.read_bytes()


class Clips:
    """The same pictures under ever new bytes: a box that players skip is appended with a number in it."""

    def __init__(self, folder, data):
        self._folder, self._data, self._count = folder, data, 0

    def new(self):
        self._count += 1
        path = self._folder / f"clip{self._count}.mp4"
        path.write_bytes(self._data + (16).to_bytes(4, "big") + b"free" + self._count.to_bytes(8, "big"))
        return path


async def measure(client, clips, num_clients, max_tokens):
    """One round: all clients ask both questions; the first starts at the same moment for all."""

    async def chat():
        clip = clips.new()
        return [await client.ask(clip, question, max_tokens) for question in QUESTIONS]

    started = time.perf_counter()
    chats = await asyncio.gather(*[chat() for _ in range(num_clients)])
    seconds = time.perf_counter() - started
    return summary(chats, seconds, max_tokens)


def summary(chats, seconds, max_tokens):
    return {
        "seconds": seconds,
        "tokens_per_second": len(chats) * len(QUESTIONS) * max_tokens / seconds,
        "first_ttft_seconds": statistics.median(chat[0]["ttft_seconds"] for chat in chats),
        "second_ttft_seconds": statistics.median(chat[1]["ttft_seconds"] for chat in chats),
        "max_ttft_seconds": max(answer["ttft_seconds"] for chat in chats for answer in chat),
        "texts": [answer["text"] for answer in chats[0]],
    }


def generate_round(process, clips, max_tokens):
    clip, answers = clips.new(), []
    started = time.perf_counter()
    for question in QUESTIONS:
        job = {"video": str(clip), "question": question, "num_frames": NUM_FRAMES, "max_new_tokens": max_tokens}
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        answers.append(json.loads(process.stdout.readline()))
    return summary([answers], time.perf_counter() - started, max_tokens)


def run(arguments, folder):
    size = "quick" if arguments.quick else "full"
    model = make_qwen3_vl(
        folder / "model", **SIZES[size], video_size={"shortest_edge": 4096, "longest_edge": 2_000_000}
    )
    settings = json.loads((model / "generation_config.json").read_text())
    settings.pop("eos_token_id", None)  # every answer has its full length on every system
    (model / "generation_config.json").write_text(json.dumps(settings))
    clips = Clips(folder, make_clip(folder / "source.mp4", "320x180" if arguments.quick else "854x480"))
    port, peer_port = free_port(), free_port()
    url, peer_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer_port}"
    peers = Path(__file__).with_name("peers.py")
    python, cores = arguments.peers_python, arguments.cores
    serve = [sys.executable, "-m", "filmstrip.cli.main", "serve", model, "--port", port, "--served-model-name", "bench",
             "--num-threads", len(cores), "--allowed-local-media-path", folder, "--kv-cache-gb", 2,
             "--encoder-cache-gb", 0.25, "--log-level", "warning"]  # fmt: skip
    peer = [python, peers, "serve", model, "--port", peer_port, "--device", "cpu", "--dtype", "float32"]
    frames = {"num_frames": NUM_FRAMES}
    clients = {
        "filmstrip": Client(url, "bench", {"media_io_kwargs": {"video": frames}, "ignore_eos": True}),
        "transformers serve": Client(peer_url, str(model), {"chat_template_kwargs": {**frames, "fps": None}}),
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(running(serve, cores, url))
        stack.enter_context(running(peer, cores, peer_url))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        generate = stack.enter_context(running([python, peers, "generate", model], cores, **pipes))
        assert generate.stdout.readline().strip() == "ready"
        with asyncio.Runner() as loop:
            samples = measure_all(arguments, loop, clients, generate, clips)
    return samples


def measure_all(arguments, loop, clients, generate, clips):
    """All rounds of all numbers of clients, the systems in turns; a first round of each is not counted."""
    samples = {}
    for client in clients.values():
        loop.run(client.ask(clips.new(), "Ready?", 2))
    generate_round(generate, clips, 2)
    for num_clients in arguments.clients:
        for round_number in range(arguments.rounds):
            for name, client in clients.items():
                result = loop.run(measure(client, clips, num_clients, arguments.max_tokens))
                samples.setdefault(f"{name}, {num_clients}", []).append(result)
            if num_clients == 1:
                result = generate_round(generate, clips, arguments.max_tokens)
                samples.setdefault("generate, 1", []).append(result)
            print(f"{num_clients} clients, round {round_number + 1} of {arguments.rounds}", file=sys.stderr)
    return samples


def medians(rounds):
    return {
        key: statistics.median(each[key] for each in rounds)
        for key in ("tokens_per_second", "first_ttft_seconds", "second_ttft_seconds", "max_ttft_seconds", "seconds")
    }


def report(arguments, samples):
    first = {name: rounds[0]["texts"] for name, rounds in samples.items()}
    for rounds in samples.values():
        for each in rounds:
            each.pop("texts")
    return {
        "question": "concurrent video chats: each client asks two questions about its own clip",
        "command": "python benchmarks/chat.py " + " ".join(
            "PEERS" if previous == "--peers-python" else argument
            for previous, argument in zip(["", *sys.argv[1:]], sys.argv[1:], strict=False)
        ),
        "machine": {"cpu": cpu_model(), "cores_used": len(arguments.cores), "system": platform.system()},
        "versions": {name: version(name) for name in ("torch", "transformers", "av", "numba")}
        | {"python": platform.python_version()},
        "settings": {"num_frames": NUM_FRAMES, "max_tokens": arguments.max_tokens, "clip": "854x480, 241 frames, h264",
                     "checkpoint": SIZES["quick" if arguments.quick else "full"], "dtype": "float32"},
        "same_answers": first["filmstrip, 1"] == first["generate, 1"] if "generate, 1" in first else None,
        "medians": {name: medians(rounds) for name, rounds in samples.items()},
        "samples": samples,
    }  # fmt: skip


def cpu_model():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor()


def table(results):
    """The README's table."""
    rows = [
        "| system, clients | tokens/s | first question, TTFT s | second question, TTFT s |",
        "| --- | --- | --- | --- |",
    ]
    for name, median in results["medians"].items():
        values = (median[key] for key in ("tokens_per_second", "first_ttft_seconds", "second_ttft_seconds"))
        rows.append(f"| {name} | " + " | ".join(f"{value:.2f}" for value in values) + " |")
    rounds = min(len(each) for each in results["samples"].values())
    machine = results["machine"]
    settings = results["settings"]
    same = "the same tokens as" if results["same_answers"] else "not the same tokens as"
    rows.append(
        f"\nTwo questions about a clip of one's own ({settings['clip']}; {settings['num_frames']} frames, "
        f"{settings['max_tokens']} new tokens), random 0.1B checkpoint in fp32, "
        f"{machine['cores_used']} cores of {machine['cpu']}; medians of {rounds} interleaved rounds. "
        f"Filmstrip gave {same} `generate`. `{results['command']}`"
    )
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peers-python", default=sys.executable, help="Python with transformers[serving] and torchvision"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--cores", type=int, nargs="+", default=[0, 1], help="cores of each system")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it works")
    parser.add_argument("--table", action="store_true", help="print the table of the stored results and stop")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not arguments.table:
        with tempfile.TemporaryDirectory() as folder:
            results = report(arguments, run(arguments, Path(folder)))
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    print(table(json.loads(arguments.output.read_text())))


if __name__ == "__main__":
    main()
