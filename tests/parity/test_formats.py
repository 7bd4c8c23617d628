"""Checkpoints in their original layouts: prompts, pixels, logits and greedy tokens equal the same weights' in Transformers.

The tests are those of families that see tiles; only the checkpoints served are others than those that Transformers reads.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest

from filmstrip import LLM, SamplingParams
from filmstrip.config import EngineConfig
from filmstrip.models.loader import load_model
from tests.models import formats
from tests.parity.conftest import (
    MAX_NEW_TOKENS,
    Case,
    build_prompts,
    image,
    reference_case,
    run_reference_program,
    user,
)
from tests.parity.test_engine import check, make_engine, run
from tests.parity.test_tiles import (  # noqa: F401 - collected here once more
    IMAGE_CASES,
    VIDEO_CASES,
    names_of,
    test_after_a_prefix_hit,
    test_after_an_encoder_hit,
    test_alone,
    test_answers_are_not_trivial,
    test_chunked,
    test_in_a_batch,
    test_prompts,
)


@dataclass(frozen=True)
class Family:
    """``make`` writes a checkpoint in its original layout and its twin."""

    make: Callable[..., tuple[str, str]]
    takes_video: bool = False
    num_frames: int | None = None
    """Asked for of every video, where the checkpoint names no number: Transformers would show all frames."""


_LLAMA, _MISTRAL, _QWEN = (f"Llava{name}ForCausalLM" for name in ("Llama", "Mistral", "Qwen"))
FAMILIES = {
    "internvl_chat_qwen2": Family(partial(formats.make_internvl_chat, text="Qwen2ForCausalLM"), True, 5),
    "internvl_chat_qwen3": Family(partial(formats.make_internvl_chat, text="Qwen3ForCausalLM", seed=2), True, 5),
    "internvl_chat_llama": Family(partial(formats.make_internvl_chat, text="LlamaForCausalLM", seed=3), True, 5),
    "internvl_chat_qwen3_moe": Family(
        partial(formats.make_internvl_chat, text="Qwen3MoeForCausalLM", qkv_bias=False, seed=1), True, 5
    ),
    "interns1_qwen3": Family(partial(formats.make_interns1, text="Qwen3ForCausalLM", layers="layers"), True),
    "interns1_qwen3_moe": Family(partial(formats.make_interns1, text="Qwen3MoeForCausalLM"), True),
    "llava_llama": Family(partial(formats.make_llava_original, architecture=_LLAMA)),
    "llava_llama_anyres": Family(partial(formats.make_llava_original, architecture=_LLAMA, aspect="anyres")),
    "llava_mistral": Family(
        partial(
            formats.make_llava_original,
            architecture=_MISTRAL,
            aspect="anyres",
            template=formats.CHATML,
            tower="another",
        )
    ),
    "llava_qwen": Family(
        partial(
            formats.make_llava_original,
            architecture=_QWEN,
            aspect="square",
            projector_type="linear",
            template=formats.CHATML,
        )
    ),
    "yi_vl": Family(
        partial(formats.make_llava_original, architecture=_LLAMA, projector_type="mlp2x_gelu_Norm", tower="folder")
    ),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return {name: family.make(tmp_path_factory.mktemp("model")) for name, family in FAMILIES.items()}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def path(family, pairs):
    return pairs[family][0]


@pytest.fixture(scope="module")
def all_conversations(cases, media_files):
    again = [
        user(image(media_files["photo"]), "First?"),
        {"role": "assistant", "content": "A bar."},
        user("And <this> ", image(media_files["strip"]), " or", image(media_files["photo"]), "?"),
    ]
    with_images = {name: cases[name] for name in IMAGE_CASES} | {"image_turns": Case("image_turns", again)}
    conversations = {}
    for name, family in FAMILIES.items():
        videos = {case: cases[case] for case in VIDEO_CASES if family.takes_video}
        if family.num_frames is not None:
            asked = {"video": {"num_frames": family.num_frames}}
            videos = {case: replace(each, media_io_kwargs=asked) for case, each in videos.items()}
        conversations[name] = with_images | videos
    return conversations


@pytest.fixture(scope="module")
def references(all_conversations, pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    specs = []
    for family, conversations in all_conversations.items():
        for case in conversations.values():
            spec, arrays = reference_case(replace(case, name=f"{family}_{case.name}"), pairs[family][1])
            np.savez(folder / f"{spec['name']}.npz", **arrays)
            specs.append(spec)
    run_reference_program(folder, specs, "format_reference.py")
    return {spec["name"]: dict(np.load(folder / f"{spec['name']}.out.npz")) for spec in specs}


@pytest.fixture(scope="module")
def conversations(all_conversations, family):
    return all_conversations[family]


@pytest.fixture(scope="module")
def expected(conversations, family, references):
    return {name: references[f"{family}_{name}"] for name in conversations}


@pytest.fixture(scope="module")
def asked(conversations, path):
    return build_prompts(conversations, path)


@pytest.fixture(scope="module")
def model(path):
    return load_model(EngineConfig(path, device="cpu", dtype="float32", num_threads=2, block_size=8))


@pytest.mark.parametrize("prefix", [True, False])
def test_after_preemption(model, asked, expected, prefix):
    """With less and less room until it runs out: prompts that begin with the same words share it."""
    names = names_of(asked)
    lengths = [len(asked[name].token_ids) for name in names]
    room, num_preemptions = sum(lengths) + 3 * model.info.block_size, 0
    while not num_preemptions:
        assert room >= max(lengths) + MAX_NEW_TOKENS, "nothing was preempted"
        engine = make_engine(model, num_tokens=room, prefix=prefix, max_num_batched_tokens=256)
        results = run(engine, {name: asked[name] for name in names})
        for name in names:
            check(results[name], expected[name])
        num_preemptions = engine.stats()["num_preemptions"]
        room -= room // 12


def test_weights_are_all_used(path, caplog):
    load_model(EngineConfig(path, device="cpu", dtype="float32", num_threads=2))
    assert "are not used" not in caplog.text


@pytest.mark.parametrize("name", ["internvl_chat_qwen2", "yi_vl"])
def test_from_messages_to_words(name, pairs, all_conversations, references):
    """Through the engine's process."""
    case = all_conversations[name]["image_turns"]
    sizes = {"kv_cache_gb": 0.02, "encoder_cache_gb": 0.01}
    with LLM(pairs[name][0], device="cpu", dtype="float32", num_threads=2, num_decode_threads=2, **sizes) as llm:
        out = llm.chat(case.messages, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
    assert out.token_ids == references[f"{name}_image_turns"]["new_token_ids"][:8].tolist()
