"""Transformers' own answer to a list of cases, run as a program: ``python reference.py FOLDER``.

It runs in a process of its own because Transformers' video processors need torchvision, which must not reach the process
that tests Filmstrip. ``FOLDER`` holds ``cases.json`` and one ``NAME.npz`` of decoded media per case; each case's reference
values are written to ``NAME.out.npz``. Where it holds ``arithmetic.npz`` (columns of sizes and lengths), the reference's
sizes and frame choices for them are written to ``arithmetic.out.npz``.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

# torchvision built for another torch lacks these two operators; defining them is enough to import it.
_LIBRARY = torch.library.Library("torchvision", "DEF")
_LIBRARY.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_LIBRARY.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: E402
from transformers.image_utils import SizeDict  # noqa: E402
from transformers.models.qwen2_vl import image_processing_qwen2_vl as image_reference  # noqa: E402
from transformers.models.qwen2_vl import video_processing_qwen2_vl as frame_reference  # noqa: E402
from transformers.models.qwen3_vl import video_processing_qwen3_vl as video_reference  # noqa: E402
from transformers.video_processing_utils import BaseVideoProcessor  # noqa: E402
from transformers.video_utils import VideoMetadata  # noqa: E402


def load_media(case: dict, arrays) -> tuple[list, list, list, bool]:
    """Images, videos, their metadata, and whether the processor is to sample the videos itself."""
    images, videos, metadata, sample = [], [], [], True
    for i, item in enumerate(case["media"]):
        pixels = arrays[f"media{i}"]
        if item["type"] == "image":
            images.append(Image.fromarray(pixels))
            continue
        videos.append(torch.from_numpy(pixels).permute(0, 3, 1, 2))
        sample = sample and item["frames_indices"] is None
        metadata.append(
            VideoMetadata(
                total_num_frames=item["total_num_frames"],
                fps=item["fps"],
                duration=item["total_num_frames"] / item["fps"],
                height=pixels.shape[1],
                width=pixels.shape[2],
                frames_indices=item["frames_indices"],
            )
        )
    return images, videos, metadata, sample


@torch.inference_mode()
def run_case(case: dict, arrays, processor, model) -> dict[str, np.ndarray]:
    """Everything a parity test compares, as arrays."""
    images, videos, metadata, sample = load_media(case, arrays)
    prompt = processor.apply_chat_template(case["messages"], tokenize=False, add_generation_prompt=True)
    options = {"do_sample_frames": sample, "cap_pixels_per_frame": False} if videos else {}
    if sample and videos and processor.video_processor.fps is None:  # without a rate it would show all frames
        options["fps"] = 2
    inputs = processor(
        text=[prompt],
        images=images or None,
        videos=videos or None,
        video_metadata=metadata or None,
        return_tensors="pt",
        **options,
    )
    names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    grids = {key: inputs[key] for key in names if key in inputs}
    positions, _ = model.model.get_rope_index(inputs["input_ids"], inputs.get("mm_token_type_ids"), **grids)
    steps = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: steps.append(kwargs["position_ids"][-3:, 0, 0]), with_kwargs=True
    )
    generated = model.generate(
        **inputs,
        max_new_tokens=case["max_new_tokens"],
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    hook.remove()
    out = {key: value.numpy() for key, value in inputs.items()}
    # Where the first generated token stands on each axis, less its index: models' own deltas are not what counts here.
    out["positions"], out["delta"] = positions[:, 0].numpy(), (steps[1] - inputs["input_ids"].shape[1]).numpy()
    out["new_token_ids"] = generated.sequences[0, inputs["input_ids"].shape[1] :].numpy()
    out["logits"] = torch.cat(generated.logits).numpy()
    return out


def or_refused(function, *args, **kwargs) -> tuple[int, int]:
    """A size, or (0, 0) where the reference raises."""
    try:
        return function(*args, **kwargs)
    except ValueError:
        return 0, 0


class SizeOfFrames(BaseVideoProcessor):
    """Answers with the size to which frames would be resized."""

    def resize(self, image, size, **kwargs) -> tuple[int, int]:
        return size.height, size.width


class SizesOnly(frame_reference.Qwen2VLVideoProcessor, SizeOfFrames):
    """Qwen2-VL's processor, whose resizing ends where the size is known."""


def run_arithmetic(arrays) -> dict[str, np.ndarray]:
    """``smart_resize`` of the processors and the frames of the default sampling rules of Qwen3-VL and Qwen2-VL."""
    processor = video_reference.Qwen3VLVideoProcessor()
    other = SizesOnly()
    images, videos, indices = [], [], []
    frames, capped_frames, other_indices = [], [], []
    for n, height, width, low, high in arrays["sizes"].tolist():
        limits = {"factor": 32, "min_pixels": low, "max_pixels": high}
        images.append(or_refused(image_reference.smart_resize, height, width, **limits))
        videos.append(or_refused(video_reference.smart_resize, n, height, width, temporal_factor=2, **limits))
        shape = (torch.empty(1, n, 3, height, width, device="meta"), SizeDict(shortest_edge=low, longest_edge=high))
        frames.append(or_refused(other.resize, *shape, None, 28, cap_pixels_per_frame=False))
        capped_frames.append(or_refused(other.resize, *shape, None, 28, cap_pixels_per_frame=True))
    for total, fps in arrays["lengths"].tolist():
        metadata = VideoMetadata(total_num_frames=int(total), fps=fps)
        chosen = processor.sample_frames(metadata, fps=2)
        indices.append(np.pad(chosen, (0, 768 - len(chosen)), constant_values=-1))
        chosen = other.sample_frames(metadata, fps=2).numpy()
        chosen = chosen[chosen < total]  # rounding may make it count one beyond the end
        other_indices.append(np.pad(chosen, (0, 768 - len(chosen)), constant_values=-1))
    sizes = {"images": images, "videos": videos, "frames": frames, "capped_frames": capped_frames}
    values = sizes | {"indices": indices, "other_indices": other_indices}
    return {name: np.array(value) for name, value in values.items()}


def main(folder: Path) -> None:
    torch.set_num_threads(2)
    if (folder / "arithmetic.npz").exists():
        with np.load(folder / "arithmetic.npz") as arrays:
            np.savez(folder / "arithmetic.out.npz", **run_arithmetic(arrays))
    cases = json.loads((folder / "cases.json").read_text())
    for checkpoint in dict.fromkeys(case["checkpoint"] for case in cases):
        processor = AutoProcessor.from_pretrained(checkpoint)
        model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
        model.generation_config.eos_token_id = None  # every case gives its full number of tokens
        for case in cases:
            if case["checkpoint"] == checkpoint:
                with np.load(folder / f"{case['name']}.npz") as arrays:
                    np.savez(folder / f"{case['name']}.out.npz", **run_case(case, arrays, processor, model))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
