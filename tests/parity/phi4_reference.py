"""Transformers' own answer to cases for Phi-4-multimodal: ``python phi4_reference.py FOLDER``.

As ``tile_reference.py`` beside it. The vision tower runs with plain attention: with the fused one Transformers lets patches
see only those before them where no patch of a picture is padding.

A case may be ``stepwise``: generated here, with a pass over all tokens where the answer crosses the length at which LongRoPE
changes. It is what Transformers means to do (``prepare_inputs_for_generation`` drops the cache there), but the version at
hand then goes on from the newest token alone.

``sizes.npz`` (pairs of height and width) is answered with the crops and tokens of blank pictures.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from reference import load_media
from tile_reference import run_case
from transformers import AutoModelForCausalLM, AutoProcessor


@torch.inference_mode()
def step_by_step(case: dict, arrays, processor, model) -> dict[str, np.ndarray]:
    """Tokens of a conversation, or behind bare token ids."""
    inputs, ids = {}, torch.tensor([case.get("token_ids", [])])
    if case["messages"]:
        prompt = processor.apply_chat_template(case["messages"], tokenize=False, add_generation_prompt=True)
        inputs = dict(processor(text=[prompt], images=load_media(case, arrays)[0], return_tensors="pt"))
        ids = inputs.pop("input_ids")
    inputs.pop("attention_mask", None)
    length, limit, logits = ids.shape[1], model.config.original_max_position_embeddings, []
    for _ in range(case["max_new_tokens"]):
        if ids.shape[1] in (length, limit + 1):
            output = model(input_ids=ids, use_cache=True, **inputs)
        else:
            output = model(input_ids=ids[:, -1:], past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], dim=1)
    return {
        "input_ids": ids[:, :length].numpy(),
        "new_token_ids": ids[0, length:].numpy(),
        "logits": torch.cat(logits).numpy(),
    }


def answer_sizes(sizes: np.ndarray, processor) -> dict[str, np.ndarray]:
    """For the checkpoint's number of crops and for 36: canvas (height, width), patches that are no padding, tokens.

    Zeros where the picture is refused.
    """
    answers = np.zeros((len(sizes), 2, 4), np.int64)
    for both, (height, width) in zip(answers, sizes.tolist(), strict=True):
        blank = torch.zeros(3, height, width, dtype=torch.uint8)
        for answer, options in zip(both, ({}, {"dynamic_hd": 36}), strict=True):
            try:
                out = processor.image_processor(images=[blank], return_tensors="pt", **options)
            except ValueError:
                continue
            shown = int(out["image_attention_mask"][0, 1:].sum())
            answer[:] = (*out["image_sizes"][0].tolist(), shown, int(out["num_img_tokens"][0]))
    return {"answers": answers}


def main(folder: Path) -> None:
    torch.set_num_threads(2)
    cases = json.loads((folder / "cases.json").read_text())
    processor = AutoProcessor.from_pretrained(cases[0]["checkpoint"])
    with np.load(folder / "sizes.npz") as arrays:
        np.savez(folder / "sizes.out.npz", **answer_sizes(arrays["sizes"], processor))
    for checkpoint in dict.fromkeys(case["checkpoint"] for case in cases):
        processor = AutoProcessor.from_pretrained(checkpoint)
        processor.chat_template = processor.tokenizer.chat_template  # this class of processors does not read it
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation={"": "sdpa", "vision_config": "eager"}
        )
        model.generation_config.eos_token_id = None  # every case gives its full number of tokens
        for case in cases:
            if case["checkpoint"] == checkpoint:
                run = step_by_step if case["stepwise"] else run_case
                with np.load(folder / f"{case['name']}.npz") as arrays:
                    np.savez(folder / f"{case['name']}.out.npz", **run(case, arrays, processor, model))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
