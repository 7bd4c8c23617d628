"""Concurrent chats about videos: Filmstrip against ``transformers serve`` and ``generate``.

Each client has a clip of its own, asks one question about it, then a second one. Every answer has the same number of tokens,
every clip the same frames; clips differ in their bytes, so that nothing is known before the first question. All systems run
the same random checkpoint in fp32 on the same cores, one at a time, in turns; the clients have the other cores. ``generate``
answers one question after the other, so it is measured with one client only.

The run stops if prompts differ in length between the systems or an answer has another length than asked; how many answers
are those of ``generate`` is counted. Clips are given by path: ``transformers serve`` reads paths and http addresses only, no
``data:`` or ``file://`` URL. TTFT is the time to the first text, for ``generate`` to the first token.

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

from filmstrip.demo.checkpoint import CONTROL_TOKENS, make_qwen3_vl

RESULTS = Path(__file__).parent / "results" / "chat.json"
NUM_FRAMES, CLIP_FRAMES = 16, 241  # 240 / 15 is whole: truncated or rounded, both systems take the same frames
CLIP_SIZES = {"full": "854x480", "quick": "320x180"}
PEERS = {"transformers-serve": "transformers serve", "generate": "generate"}
NOTES = (
    "transformers serve: one generate after the other, nothing kept between requests, videos decoded in the event loop",
    "transformers serve reads the clip's sound track too, although the model has no use for it; the clip's is silent",
    "a random model soon repeats itself: answers_of_generate shows how much of an answer two systems can differ in",
    "filmstrip: continuous batching; keeps decoded media, encoded media and the prompt's keys and values of its requests",
)
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
            stream_options={"include_usage": True},
            extra_body=self._extra_body,
        )
        first, text, usage = None, "", None
        async for chunk in stream:
            usage = chunk.usage or usage
            if chunk.choices and chunk.choices[0].delta.content:
                first = first or time.perf_counter() - started
                text += chunk.choices[0].delta.content
        if usage is None:
            raise SystemExit(f"the answer of {self._model} came without token counts: {text!r}")
        return {
            "ttft_seconds": first,
            "seconds": time.perf_counter() - started,
            "text": text,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
        }


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
    """One round's numbers; a system that did other work than asked ends the run."""
    for answer in (answer for chat in chats for answer in chat):
        if answer["completion_tokens"] != max_tokens or answer["ttft_seconds"] is None:
            raise SystemExit(f"an answer should have text and {max_tokens} tokens: {answer}")
    return {
        "seconds": seconds,
        "tokens_per_second": len(chats) * len(QUESTIONS) * max_tokens / seconds,
        "first_ttft_seconds": statistics.median(chat[0]["ttft_seconds"] for chat in chats),
        "second_ttft_seconds": statistics.median(chat[1]["ttft_seconds"] for chat in chats),
        "max_ttft_seconds": max(answer["ttft_seconds"] for chat in chats for answer in chat),
        "first_seconds": statistics.median(chat[0]["seconds"] for chat in chats),
        "second_seconds": statistics.median(chat[1]["seconds"] for chat in chats),
        "prompt_tokens": [answer["prompt_tokens"] for answer in chats[0]],
        "texts": [[answer["text"] for answer in chat] for chat in chats],
    }


class Generate:
    """``generate`` in a process that reads one question per line."""

    def __init__(self, process):
        self._process = process
        self._read()

    def ask(self, clip, question, max_tokens):
        """Seconds to the first token and altogether, and the answer."""
        job = {"video": str(clip), "question": question, "num_frames": NUM_FRAMES, "max_new_tokens": max_tokens}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._read())
        return answer | {"completion_tokens": len(answer["token_ids"])}

    def measure(self, clips, max_tokens):
        """One round of one client."""
        clip, started = clips.new(), time.perf_counter()
        answers = [self.ask(clip, question, max_tokens) for question in QUESTIONS]
        return summary([answers], time.perf_counter() - started, max_tokens)

    def _read(self):
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"generate ended with {self._process.wait()}; run benchmarks/peers.py by hand to see why")
        return line


def run(arguments, folder):
    size = "quick" if arguments.quick else "full"
    model = make_qwen3_vl(
        folder / "model", **SIZES[size], video_size={"shortest_edge": 4096, "longest_edge": 2_000_000}
    )
    settings = json.loads((model / "generation_config.json").read_text())
    settings.pop("eos_token_id", None)  # every answer has its full length on every system
    (model / "generation_config.json").write_text(json.dumps(settings))
    clips = Clips(folder, make_clip(folder / "source.mp4", CLIP_SIZES[size]))
    port, peer_port = free_port(), free_port()
    url, peer_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer_port}"
    peers = Path(__file__).with_name("peers.py")
    python, cores = arguments.peers_python, arguments.cores
    serve = [sys.executable, "-m", "filmstrip.cli.main", "serve", model, "--port", port, "--served-model-name", "bench",
             "--num-threads", len(cores), "--allowed-local-media-path", folder, "--kv-cache-gb", 2,
             "--encoder-cache-gb", 0.25, "--log-level", "warning"]  # fmt: skip
    peer = [python, peers, "serve", model, "--port", peer_port, "--device", "cpu", "--dtype", "float32"]
    frames = {"num_frames": NUM_FRAMES}
    clients = {"filmstrip": Client(url, "bench", {"media_io_kwargs": {"video": frames}, "ignore_eos": True})}
    generate = None
    with contextlib.ExitStack() as stack:
        stack.enter_context(running(serve, cores, url))
        if "transformers-serve" in arguments.peers:
            stack.enter_context(running(peer, cores, peer_url))
            clients[PEERS["transformers-serve"]] = Client(
                peer_url, str(model), {"chat_template_kwargs": {**frames, "fps": None}}
            )
        if "generate" in arguments.peers:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            generate = Generate(stack.enter_context(running([python, peers, "generate", model], cores, **pipes)))
        loop = stack.enter_context(contextlib.closing(asyncio.new_event_loop()))
        return measure_all(arguments, loop, clients, generate, clips)


def measure_all(arguments, loop, clients, generate, clips):
    """All rounds of all numbers of clients, the systems in turns; a first question to each is not counted."""
    warm_up = {name: loop.run_until_complete(each.ask(clips.new(), "Ready?", 2)) for name, each in clients.items()}
    if generate:
        warm_up["generate"] = generate.ask(clips.new(), "Ready?", 2)
    num_prompt_tokens = {name: answer["prompt_tokens"] for name, answer in warm_up.items()}
    if len(set(num_prompt_tokens.values())) > 1:
        raise SystemExit(f"the systems make different prompts of the same question: {num_prompt_tokens} tokens")
    samples = {}
    for num_clients in arguments.clients:
        for round_number in range(arguments.rounds):
            for name, client in clients.items():
                result = loop.run_until_complete(measure(client, clips, num_clients, arguments.max_tokens))
                samples.setdefault(f"{name}, {num_clients}", []).append(result)
            if num_clients == 1 and generate:
                samples.setdefault("generate, 1", []).append(generate.measure(clips, arguments.max_tokens))
            print(f"{num_clients} clients, round {round_number + 1} of {arguments.rounds}", file=sys.stderr)
    return samples


def medians(rounds):
    keys = [key for key, value in rounds[0].items() if isinstance(value, float)]
    return {key: statistics.median(each[key] for each in rounds) for key in keys}


def ratios(median):
    """How many times better Filmstrip is than each peer with as many clients, in every number; above 1 is better."""
    better = {}
    for name, theirs in median.items():
        system, num_clients = name.split(", ")
        ours = median[f"filmstrip, {num_clients}"]
        if system != "filmstrip":
            better[name] = {
                key: ours[key] / theirs[key] if key == "tokens_per_second" else theirs[key] / ours[key] for key in ours
            }
    return better


def plain(text):
    """``text`` without control tokens, which ``transformers serve`` leaves in and the others leave out."""
    for token in CONTROL_TOKENS:
        text = text.replace(token, "")
    return text


def same_answers(samples, reference):
    """For each system, how many of its answers are those of ``reference``, one for each question, and of how many."""
    counts = {}
    for name, rounds in samples.items():
        chats = [chat for each in rounds for chat in each["texts"]]
        same = sum(plain(text) == plain(other) for chat in chats for text, other in zip(chat, reference, strict=True))
        counts[name] = {"same": same, "of": len(chats) * len(reference)}
    return counts


def report(arguments, samples):
    answers = samples["generate, 1"][0]["texts"][0] if "generate, 1" in samples else None
    counts = answers and same_answers(samples, answers)
    for each in (each for rounds in samples.values() for each in rounds):
        del each["texts"]
    size = "quick" if arguments.quick else "full"
    median = {name: medians(rounds) for name, rounds in samples.items()}
    peer_versions = subprocess.run(
        [arguments.peers_python, Path(__file__).with_name("peers.py"), "versions"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {
        "question": "concurrent video chats: each client asks two questions about its own clip",
        "command": "python benchmarks/chat.py " + " ".join(
            "PEERS" if previous == "--peers-python" else argument
            for previous, argument in zip(["", *sys.argv[1:]], sys.argv[1:], strict=False)
        ),
        "machine": {"cpu": cpu_model(), "cores_used": len(arguments.cores), "client_cores": len(os.sched_getaffinity(0)),
                    "system": platform.system()},
        "versions": {name: version(name) for name in ("filmstrip", "torch", "transformers", "av", "numba", "openai")}
        | {"python": platform.python_version()},
        "peer_versions": json.loads(peer_versions.stdout),
        "settings": {"num_frames": NUM_FRAMES, "max_tokens": arguments.max_tokens,
                     "clip": f"{CLIP_SIZES[size]}, {CLIP_FRAMES} frames, h264", "checkpoint": SIZES[size],
                     "dtype": "float32"},
        "notes": NOTES,
        "same_answers": counts and counts["filmstrip, 1"]["same"] == counts["filmstrip, 1"]["of"],
        "answers_of_generate": answers,
        "answers_like_generate": counts,
        "medians": median,
        "ratios": ratios(median),
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
    size = "0.1B" if settings["checkpoint"] == SIZES["full"] else "tiny"
    same = {True: "Filmstrip gave the same text as `generate`. ", None: ""}
    rows.append(
        f"\nTwo questions about a clip of one's own ({settings['clip']}; {settings['num_frames']} frames, "
        f"{settings['max_tokens']} new tokens), random {size} checkpoint in fp32, "
        f"{machine['cores_used']} cores of {machine['cpu']}; medians of {rounds} interleaved rounds. "
        + same.get(results["same_answers"], "Filmstrip gave not the same text as `generate`. ")
        + f"`{results['command']}`"
    )
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peers-python", default=sys.executable, help="Python with transformers[serving] and torchvision"
    )
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--cores", type=int, nargs="+", default=[0, 1], help="cores of each system")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that it works")
    parser.add_argument("--table", action="store_true", help="print the table of the stored results and stop")
    parser.add_argument("--output", type=Path, help=f"JSON to write; {RESULTS.name} if not given, with --quick none")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads((arguments.output or RESULTS).read_text())))
        return
    others = os.sched_getaffinity(0) - set(arguments.cores)
    os.sched_setaffinity(0, others or arguments.cores)
    with tempfile.TemporaryDirectory() as folder:
        results = report(arguments, run(arguments, Path(folder)))
    output = arguments.output or (None if arguments.quick else RESULTS)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
