"""Transformers' own answer to cases for families that see pictures as tiles: ``python tile_reference.py FOLDER``.

As ``reference.py`` beside it, whose files and reasons are the same; there are no grids and no positions of several axes.
Pixels of an item that are padded to those of the largest are written as they are.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from reference import load_media
from transformers import AutoModelForImageTextToText, AutoProcessor


@torch.inference_mode()
def run_case(case: dict, arrays, processor, model) -> dict[str, np.ndarray]:
    """Everything a parity test compares, as arrays."""
    images, videos, metadata, sample = load_media(case, arrays)
    prompt = processor.apply_chat_template(case["messages"], tokenize=False, add_generation_prompt=True)
    options = {"videos": videos, "video_metadata": metadata, "do_sample_frames": sample} if videos else {}
    first_token = processor.tokenizer.bos_token
    if first_token and prompt.startswith(first_token):  # the template wrote it: the tokenizer must not, too
        options["add_special_tokens"] = False
    inputs = processor(text=[prompt], images=images or None, return_tensors="pt", **options)
    inputs = inputs.to(torch.float32)  # what the model computes in; Llama 4's processor gives bfloat16
    generated = model.generate(
        **inputs,
        max_new_tokens=case["max_new_tokens"],
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    out = {key: value.numpy() for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    out["new_token_ids"] = generated.sequences[0, inputs["input_ids"].shape[1] :].numpy()
    out["logits"] = torch.cat(generated.logits).numpy()
    return out


def main(folder: Path) -> None:
    torch.set_num_threads(2)
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
