"""The peers of ``chat.py``, run with the peers' own Python.

    peers.py serve ARGUMENTS... | generate MODEL | versions

``serve`` is ``transformers serve``. ``generate`` reads one JSON object per line (video, question, num_frames,
max_new_tokens) and answers each with one line: seconds to the first token, seconds altogether, the tokens.
"""

import contextlib
import importlib.metadata
import json
import platform
import sys
import time

import torch

# torchvision built for another torch lacks these two operators; defining them is enough to import it.
_LIBRARY = torch.library.Library("torchvision", "DEF")
_LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def serve(arguments):
    from transformers.cli.transformers import main

    sys.argv = ["transformers", "serve", *arguments]
    main()


@torch.inference_mode()
def generate(path):
    from transformers import AutoModelForImageTextToText, AutoProcessor, StoppingCriteria

    class FirstToken(StoppingCriteria):
        """Notes when the first token is there; stops nothing."""

        seconds = None

        def __call__(self, input_ids, *_args, **_kwargs):
            if self.seconds is None:
                self.seconds = time.perf_counter() - started
            return torch.zeros(len(input_ids), dtype=torch.bool)

    processor = AutoProcessor.from_pretrained(path)
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        started = time.perf_counter()
        content = [{"type": "video", "path": job["video"]}, {"type": "text", "text": job["question"]}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"num_frames": job["num_frames"], "fps": None, "cap_pixels_per_frame": False},
        )
        first = FirstToken()
        output = model.generate(
            **inputs, max_new_tokens=job["max_new_tokens"], do_sample=False, stopping_criteria=[first], eos_token_id=-1
        )
        prompt_length = inputs["input_ids"].shape[1]
        answer = {
            "ttft_seconds": first.seconds,
            "seconds": time.perf_counter() - started,
            "prompt_tokens": prompt_length,
            "token_ids": output[0, prompt_length:].tolist(),
            "text": processor.decode(output[0, prompt_length:], skip_special_tokens=True),
        }
        print(json.dumps(answer), flush=True)


def versions():
    """What takes part here, as one JSON object: torchcodec decodes where it is installed, else another library does."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "torchvision", "torchcodec", "av", "fastapi", "uvicorn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2:])
    elif sys.argv[1] == "generate":
        generate(sys.argv[2])
    else:
        versions()
