"""Which tests prove what of which model family, and the table of ``docs/models.md`` that says so.

    python -m tests.families        run the named tests and write the table

A tick stands only where all the tests named for it passed. In a run of the whole suite ``test_families.py`` holds the table
to what its tests did.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- begin families -->\n", "<!-- end families -->"
COLUMNS = ("text", "image", "video", "time series", "mixed", "batch", "chunked", "prefix cache", "preemption")
MEDIA = ("text", "image", "video", "mixed")


@dataclass(frozen=True)
class Family:
    """``proofs``: for each column the tests, ``file::function[parameters`` as far as they tell them from others'.

    ``not_for`` are columns that do not apply: the family does not take such media. A family without proofs is known, but not
    served.
    """

    name: str
    architectures: tuple[str, ...]
    proofs: Mapping[str, tuple[str, ...]]
    not_for: tuple[str, ...] = ("time series",)


def _with_vision(name: str, architecture: str, file: str, case: str, **others: str) -> Family:
    """A family whose parity tests go through all conversations: with text alone, pictures, videos, both."""
    seen = (f"{file}::test_alone[{case}", *((others["prompts"],) if "prompts" in others else ()))
    proofs = dict.fromkeys(MEDIA, seen)
    proofs |= {
        "batch": (f"{file}::{others['batch']}[{case}",),
        "chunked": (f"{file}::test_chunked[{case}",),
        "prefix cache": (f"{file}::{others['prefix']}[{case}",),
        "preemption": (f"{file}::test_after_preemption[{case}",),
    }
    return Family(name, (architecture,), proofs)


def _with_tiles(
    name: str, architecture: str, *cases: str, video: bool, file: str = "tests/parity/test_tiles.py"
) -> Family:
    """A family of ``test_tiles.py`` or another ``file`` with its tests; its conversations have videos if it takes them."""

    def tests(*names: str) -> tuple[str, ...]:
        return tuple(f"{file}::{name}".format(case) for name in names for case in cases)

    proofs = dict.fromkeys(MEDIA if video else ("text", "image"), tests("test_alone[{}]", "test_prompts[{}]"))
    proofs |= {
        "batch": tests("test_in_a_batch[{}]"),
        "chunked": tests("test_chunked[{}-"),
        "prefix cache": tests("test_after_a_prefix_hit[{}]"),
        "preemption": tests("test_after_preemption[{}-"),
    }
    return Family(name, (architecture,), proofs, ("time series",) if video else ("time series", "video", "mixed"))


def _phi4() -> Family:
    file, kinds = "tests/parity/test_phi4.py", ("plain", "adapted")
    shown = tuple(f"{file}::{name}[{kind}" for name in ("test_alone", "test_prompts") for kind in kinds)
    proofs = {
        "text": (*shown, f"{file}::test_lengths_share_nothing_with_each_other["),
        "image": (*shown, f"{file}::test_alone[odd", f"{file}::test_crops_of_all_sizes"),
        "batch": tuple(f"{file}::test_in_a_batch[{kind}" for kind in kinds),
        "chunked": tuple(f"{file}::test_chunked[{kind}" for kind in kinds),
        "prefix cache": (f"{file}::test_after_a_prefix_hit[", f"{file}::test_text_before_a_picture["),
        "preemption": tuple(f"{file}::test_after_preemption[{kind}" for kind in kinds),
    }
    return Family("Phi-4-multimodal", ("Phi4MultimodalForCausalLM",), proofs, ("time series", "video", "mixed"))


def _interns1_pro(*architectures: str) -> Family:
    file = "tests/parity/test_interns1_pro.py"
    alone = f"{file}::test_alone"
    pictures = (alone, f"{file}::test_pictures_are_shown_as_qwen3_vl_shows_them")
    proofs = {
        "text": (alone, "tests/models/test_interns1_pro.py::test_text["),
        "image": pictures,
        "video": pictures,
        "time series": (alone, f"{file}::test_prompts_with_time_series"),
        "mixed": (alone,),
        "batch": (f"{file}::test_in_a_batch",),
        "chunked": (f"{file}::test_chunked[",),
        "prefix cache": (f"{file}::test_after_a_prefix_hit",),
        "preemption": (f"{file}::test_after_preemption[",),
    }
    return Family("InternS1-Pro", architectures, proofs, not_for=())


def _mllama() -> Family:
    file = "tests/parity/test_mllama.py"
    seen = (f"{file}::test_alone", f"{file}::test_prompts")
    proofs = dict.fromkeys(("text", "image"), seen) | {
        "batch": (f"{file}::test_in_a_batch",),
        "chunked": (f"{file}::test_chunked[",),
        "prefix cache": (f"{file}::test_after_a_prefix_hit",),
        "preemption": (f"{file}::test_after_preemption[",),
    }
    return Family("Mllama", ("MllamaForConditionalGeneration",), proofs, not_for=("time series", "video", "mixed"))


def _text_only(name: str, architecture: str, file: str, prefix: str) -> Family:
    proofs = {
        "text": (f"{file}::test_alone[{architecture}",),
        "batch": (f"{file}::test_together_in_chunks[{architecture}",),
        "chunked": (f"{file}::test_together_in_chunks[{architecture}",),
        "prefix cache": (f"{file}::{prefix}[{architecture}",),
        "preemption": (f"{file}::test_after_preemption[{architecture}",),
    }
    return Family(name, (architecture,), proofs, not_for=("image", "video", "time series", "mixed"))


_ENGINE, _PROMPT = "tests/parity/test_engine.py", "tests/parity/test_prompt.py::test_prompt_parity["
_QWEN3_5, _NEXT, _TEXT = (f"tests/parity/test_{name}.py" for name in ("qwen3_5", "qwen3_next", "text"))
_FORMATS = "tests/parity/test_formats.py"
_VL = {"batch": "test_in_a_batch_of_eight", "prefix": "test_after_a_prefix_hit", "prompts": _PROMPT}
_HYBRID = {"batch": "test_in_a_batch", "prefix": "test_from_kept_states"}
_QWEN2_VL = "tests/parity/test_qwen2_vl.py"
_RUN = {"batch": "test_in_a_batch", "prefix": "test_after_a_prefix_hit"}
_MOLMO2 = "tests/parity/test_molmo2.py"
_GLM_V = "tests/parity/test_glm_v.py"
_OMNI = "tests/parity/test_omni.py"
_OMNI_TESTS = _RUN | {"prompts": f"{_OMNI}::test_prompts["}
_MINICPM_V = "tests/parity/test_minicpm_v.py"
_GLM = _RUN | {"prompts": f"{_GLM_V}::test_prompts["}

FAMILIES = (
    _with_vision("Qwen3-VL", "Qwen3VLForConditionalGeneration", _ENGINE, "dense", **_VL),
    _with_vision("Qwen3-VL-MoE", "Qwen3VLMoeForConditionalGeneration", _ENGINE, "moe", **_VL),
    _interns1_pro("InternS1ProForConditionalGeneration", "InternS1_1_ForConditionalGeneration"),
    _with_vision(
        *("Qwen3.5", "Qwen3_5ForConditionalGeneration", _QWEN3_5, "dense"),
        **_HYBRID,
        prompts=f"{_QWEN3_5}::test_prompts[dense",
    ),
    _with_vision(
        *("Qwen3.5-MoE", "Qwen3_5MoeForConditionalGeneration", _QWEN3_5, "moe"),
        **_HYBRID,
        prompts=f"{_QWEN3_5}::test_prompts[moe",
    ),
    _with_vision(
        *("Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration", _QWEN2_VL, "qwen2_5_vl"),
        **_RUN,
        prompts=f"{_QWEN2_VL}::test_prompts[qwen2_5_vl",
    ),
    _with_vision(
        *("Qwen2-VL", "Qwen2VLForConditionalGeneration", _QWEN2_VL, "qwen2_vl"),
        **_RUN,
        prompts=f"{_QWEN2_VL}::test_prompts[qwen2_vl",
    ),
    _with_vision("GLM-4.1V", "Glm4vForConditionalGeneration", _GLM_V, "glm_4_1v", **_GLM),
    _with_vision("GLM-4.5V", "Glm4vMoeForConditionalGeneration", _GLM_V, "glm_4_5v", **_GLM),
    _with_vision("GLM-4.6V", "Glm46VForConditionalGeneration", _GLM_V, "glm_4_6v", **_GLM),
    _with_tiles("Llama 4", "Llama4ForConditionalGeneration", "llama4", video=False),
    _with_vision("Qwen3-Omni", "Qwen3OmniMoeForConditionalGeneration", _OMNI, "whole", **_OMNI_TESTS),
    _with_vision(
        *("Qwen3-Omni, thinker alone", "Qwen3OmniMoeThinkerForConditionalGeneration", _OMNI, "thinker"), **_OMNI_TESTS
    ),
    _with_tiles("InternVL3", "InternVLForConditionalGeneration", "internvl", video=True),
    _with_tiles("LLaVA-OneVision", "LlavaOnevisionForConditionalGeneration", "llava_onevision", video=True),
    _with_vision(
        *("MiniCPM-V 4.6", "MiniCPMV4_6ForConditionalGeneration", _MINICPM_V, "minicpm_v"),
        **_HYBRID,
        prompts=f"{_MINICPM_V}::test_prompts[minicpm_v",
    ),
    _with_vision(
        *("Molmo 2", "Molmo2ForConditionalGeneration", _MOLMO2, "molmo2"),
        **_RUN,
        prompts=f"{_MOLMO2}::test_prompts[molmo2",
    ),
    _with_tiles("LLaVA-NeXT", "LlavaNextForConditionalGeneration", "llava_next", video=False),
    _with_tiles("DeepSeek-VL", "DeepseekVLForConditionalGeneration", "deepseek_vl", video=False),
    _with_tiles("DeepSeek-VL hybrid", "DeepseekVLHybridForConditionalGeneration", "deepseek_vl_hybrid", video=False),
    _with_tiles("Gemma 3", "Gemma3ForConditionalGeneration", "gemma3", video=False),
    _phi4(),
    _with_tiles("LLaVA", "LlavaForConditionalGeneration", "llava", "llava_siglip", video=False),
    _mllama(),
    _with_tiles(
        "Intern-S1",
        "InternS1ForConditionalGeneration",
        "interns1_qwen3",
        "interns1_qwen3_moe",
        video=True,
        file=_FORMATS,
    ),
    _with_tiles(
        "InternVL, original",
        "InternVLChatModel",
        "internvl_chat_qwen2",
        "internvl_chat_qwen3",
        "internvl_chat_llama",
        "internvl_chat_qwen3_moe",
        video=True,
        file=_FORMATS,
    ),
    _with_tiles(
        "LLaVA and Yi-VL, original",
        "LlavaLlamaForCausalLM",
        "llava_llama",
        "llava_llama_anyres",
        "yi_vl",
        video=False,
        file=_FORMATS,
    ),
    _with_tiles("LLaVA, original", "LlavaMistralForCausalLM", "llava_mistral", video=False, file=_FORMATS),
    _with_tiles("LLaVA, original", "LlavaQwenForCausalLM", "llava_qwen", video=False, file=_FORMATS),
    _text_only("Qwen3.5, text only", "Qwen3_5ForCausalLM", _NEXT, "test_from_a_kept_state"),
    _text_only("Qwen3.5-MoE, text only", "Qwen3_5MoeForCausalLM", _NEXT, "test_from_a_kept_state"),
    _text_only("Qwen3-Next", "Qwen3NextForCausalLM", _NEXT, "test_from_a_kept_state"),
    _text_only("Qwen3", "Qwen3ForCausalLM", _TEXT, "test_after_a_prefix_hit"),
    _text_only("Qwen3-MoE", "Qwen3MoeForCausalLM", _TEXT, "test_after_a_prefix_hit"),
    _text_only("Qwen2", "Qwen2ForCausalLM", _TEXT, "test_after_a_prefix_hit"),
    _text_only("Gemma 3, text only", "Gemma3ForCausalLM", _TEXT, "test_after_a_prefix_hit"),
    _text_only("Llama 4, text only", "Llama4ForCausalLM", _TEXT, "test_after_a_prefix_hit"),
    _text_only("Llama", "LlamaForCausalLM", _TEXT, "test_after_a_prefix_hit"),
    _text_only("Mistral", "MistralForCausalLM", _TEXT, "test_after_a_prefix_hit"),
    Family("CogVLM2", ("CogVLMForCausalLM", "CogVLMVideoForCausalLM"), {}),
    Family("GLM-4V-9B", ("ChatGLMForConditionalGeneration", "ChatGLMModel"), {}),
    Family("DeepSeek-VL2", ("DeepseekVLV2ForCausalLM",), {}),
    Family("InternLM-XComposer2", ("InternLMXComposer2ForCausalLM",), {}),
    Family("Phi-3-vision", ("Phi3VForCausalLM",), {}),
    Family("Qwen-VL", ("QWenLMHeadModel",), {}),
)


def proven(proofs: tuple[str, ...], outcomes: Mapping[str, bool]) -> bool:
    """Whether tests of each named kind ran, and all of them passed."""
    return all(
        (found := [passed for test, passed in outcomes.items() if test.startswith(proof)]) and all(found)
        for proof in proofs
    )


def table(outcomes: Mapping[str, bool]) -> str:
    """The Markdown table: ✓ proven, – does not apply, nothing: open."""
    lines = ["| family | " + " | ".join(COLUMNS) + " |", "| --- |" + " :-: |" * len(COLUMNS)]
    for family in FAMILIES:
        cells = []
        for column in COLUMNS:
            proofs = family.proofs.get(column)
            is_proven = proofs is not None and proven(proofs, outcomes)
            cells.append("✓" if is_proven else "–" if column in family.not_for else " ")
        lines.append(f"| {family.name} (`{', '.join(family.architectures)}`) | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


class Outcomes:
    """A pytest plugin that notes whether tests passed, by node id."""

    def __init__(self) -> None:
        self.passed: dict[str, bool] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test has passed if none of its phases failed and its body was not skipped."""
        failed = report.failed or (report.when == "call" and not report.passed)
        if failed or report.when == "call":
            self.passed[report.nodeid] = not failed and self.passed.get(report.nodeid, True)


def main() -> int:
    """Run the tests that are named, write the table; the exit code is pytest's."""
    files = sorted({proof.split("::")[0] for family in FAMILIES for tests in family.proofs.values() for proof in tests})
    outcomes = Outcomes()
    code = pytest.main(["-q", *files], plugins=[outcomes])
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    DOCUMENT.write_text(before + BEGIN + table(outcomes.passed) + END + rest.partition(END)[2], encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
