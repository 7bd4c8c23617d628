"""Text answers while videos are decoded: does a question without media wait for others' clips?

A server answers short text questions, one after the other. In each round they are asked first with nothing else to do, then
while it opens and decodes many long videos at once (each with other frames, so that nothing comes from a cache). So many
frames are asked for that no video is ready before the last question is answered: what is measured is decoding beside the
engine. Then the videos' clients go away, and the server must be as fast as before.

    python benchmarks/load.py --clip clip-1080p-600s.mp4
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import openai
from chat import SIZES, cpu_model, free_port, running

from filmstrip.demo.checkpoint import make_qwen3_vl

RESULTS = Path(__file__).parent / "results" / "load.json"
QUESTION = "What is the capital of France?"


class Client:
    """Asks the server."""

    def __init__(self, url):
        self._client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=900)

    async def text(self, number):
        """Seconds to the first token of a short answer to a question of its own."""
        started = time.perf_counter()
        stream = await self._client.chat.completions.create(
            model="bench",
            messages=[{"role": "user", "content": f"{number}. {QUESTION}"}],
            max_tokens=2,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        first = None
        async for chunk in stream:
            if chunk.choices and chunk.choices[0].delta.content is not None and chunk.choices[0].delta.role is None:
                first = first or time.perf_counter() - started
        return first or time.perf_counter() - started

    async def video(self, clip, number, num_frames):
        """One token about frames that no other request looks at, shown small."""
        await self._client.chat.completions.create(
            model="bench",
            messages=[
                {
                    "role": "user",
                    "content": [
                        {"type": "video_url", "video_url": {"url": str(clip), "start": number * 0.1}},
                        {"type": "text", "text": "What happens?"},
                    ],
                }
            ],
            max_tokens=1,
            temperature=0,
            extra_body={
                "ignore_eos": True,
                "media_io_kwargs": {"video": {"num_frames": num_frames}},
                "mm_processor_kwargs": {"video": {"min_pixels": 4096, "max_pixels": 1024 * num_frames}},
            },
        )


async def ask(client, numbers, count):
    """TTFTs of text questions asked one after the other."""
    seconds = []
    for _ in range(count):
        seconds.append(await client.text(next(numbers)))
        await asyncio.sleep(0.05)
    return seconds


async def measure(arguments, client, round_number, numbers):
    """One round: TTFTs when idle, and while videos are decoded."""
    idle = await ask(client, numbers, arguments.questions)
    first = round_number * arguments.videos
    videos = [
        asyncio.ensure_future(client.video(arguments.clip, first + i, arguments.frames))
        for i in range(arguments.videos)
    ]
    await asyncio.sleep(1)
    loaded = await ask(client, numbers, arguments.questions)
    if any(video.done() for video in videos):
        raise SystemExit("a video was ready, or refused, before the last answer: ask for more frames")
    for video in videos:
        video.cancel()
    await asyncio.gather(*videos, return_exceptions=True)
    await asyncio.sleep(2)
    after = await ask(client, numbers, arguments.questions)
    return {
        "idle_ttft_seconds": statistics.median(idle),
        "loaded_ttft_seconds": statistics.median(loaded),
        "loaded_ttft_95_percent_seconds": statistics.quantiles(loaded, n=20)[-1],
        "idle_ttft_95_percent_seconds": statistics.quantiles(idle, n=20)[-1],
        "after_ttft_seconds": statistics.median(after),
        "ratio": statistics.median(loaded) / statistics.median(idle),
    }


async def measure_all(arguments, url):
    client, numbers = Client(url), iter(range(10**9))
    await client.video(arguments.clip, 5000, 4)
    await ask(client, numbers, 3)
    rounds = []
    for number in range(arguments.rounds):
        rounds.append(await measure(arguments, client, number, numbers))
        print(f"round {number + 1}: {rounds[-1]}", file=sys.stderr)
    return rounds


def run(arguments, folder):
    model = make_qwen3_vl(
        folder / "model", **SIZES["full"], video_size={"shortest_edge": 4096, "longest_edge": 2_000_000}
    )
    port = free_port()
    serve = [sys.executable, "-m", "filmstrip.cli.main", "serve", model, "--port", port, "--served-model-name", "bench",
             "--num-threads", len(arguments.cores), "--allowed-local-media-path", arguments.clip.parent,
             "--kv-cache-gb", 2, "--encoder-cache-gb", 0.25, "--media-cache-gb", 0, "--log-level", "warning"]  # fmt: skip
    with running(serve, arguments.cores, f"http://127.0.0.1:{port}"):
        return asyncio.run(measure_all(arguments, f"http://127.0.0.1:{port}"))


def table(results):
    median = results["median"]
    lines = [
        "| time to first token of a text question | median | 95 % |",
        "| --- | ---: | ---: |",
        f"| nothing else to do | {1000 * median['idle_ttft_seconds']:.0f} ms "
        f"| {1000 * median['idle_ttft_95_percent_seconds']:.0f} ms |",
        f"| while {results['num_videos']} videos are decoded | {1000 * median['loaded_ttft_seconds']:.0f} ms "
        f"| {1000 * median['loaded_ttft_95_percent_seconds']:.0f} ms |",
        "",
        f"{median['ratio']:.2f} times as long, medians of {len(results['samples'])} rounds of {results['num_questions']} "
        f"questions; each video is ten minutes of 1080p, of which {results['num_frames']} frames are wanted; once their "
        f"clients are gone, the median is {1000 * median['after_ttft_seconds']:.0f} ms. Random 0.1B checkpoint; "
        f"{results['machine']['cores_used']} cores of {results['machine']['cpu']} for the server, all its processes and the "
        f"client. `{results['command']}`",
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="print the Markdown table of the results and exit")
    parser.add_argument("--clip", type=lambda text: Path(text).resolve(), help="a long clip")
    parser.add_argument("--videos", type=int, default=50)
    parser.add_argument("--frames", type=int, default=768)
    parser.add_argument("--questions", type=int, default=30, help="text questions when idle")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--num-cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(RESULTS.read_text())))
        return
    arguments.cores = sorted(os.sched_getaffinity(0))[: arguments.num_cores]
    with tempfile.TemporaryDirectory() as folder:
        samples = run(arguments, Path(folder))
    keys = samples[0].keys()
    results = {
        "question": "do text questions wait while videos are decoded?",
        "command": f"python benchmarks/load.py --clip {arguments.clip.name}",
        "machine": {"cpu": cpu_model(), "cores_used": len(arguments.cores), "system": platform.system()},
        "torch": __import__("torch").__version__,
        "num_videos": arguments.videos,
        "num_questions": arguments.questions,
        "num_frames": arguments.frames,
        "clip": arguments.clip.name,
        "median": {key: statistics.median(sample[key] for sample in samples) for key in keys},
        "samples": samples,
    }
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
