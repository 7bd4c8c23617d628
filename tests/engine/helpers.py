"""What the engine's tests share: small engines on the fake model, and answers computed alone to compare with."""

from __future__ import annotations

from collections.abc import Mapping

from filmstrip.engine.engine import Engine, EngineLimits, StepOutput
from filmstrip.types import ProcessedPrompt, SamplingParams
from tests.fakes import FakeModel


def greedy(max_tokens: int = 8, **options) -> SamplingParams:
    """Exactly ``max_tokens`` tokens, always the likeliest."""
    return SamplingParams(max_tokens=max_tokens, temperature=0, **options)


def make_engine(
    *,
    num_blocks: int = 256,
    max_model_len: int = 512,
    max_num_seqs: int = 16,
    max_num_batched_tokens: int = 512,
    encoder_cache_bytes: int = 1 << 20,
    prefix: bool = True,
    model: FakeModel | None = None,
) -> Engine:
    """An engine over a fake model."""
    limits = EngineLimits(
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        encoder_cache_bytes=encoder_cache_bytes,
        enable_prefix_caching=prefix,
    )
    return Engine(model or FakeModel(), limits)


def fake_of(engine: Engine) -> FakeModel:
    """The engine's model, as the fake it is."""
    assert isinstance(engine.model, FakeModel)
    return engine.model


def step(engine: Engine) -> list[StepOutput]:
    """One step, with every block accounted for after it."""
    outputs = engine.step()
    engine.check_integrity()
    return outputs


def drain(engine: Engine, *, max_steps: int = 5000) -> dict[str, list[int]]:
    """Run to the end; tokens per request. No request may fail, and no block may be left."""
    tokens: dict[str, list[int]] = {}
    for _ in range(max_steps):
        if not engine.has_work:
            break
        for output in step(engine):
            assert output.error is None, output.error
            tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
    assert not engine.has_work, "the engine does not come to an end"
    assert engine.stats()["num_allocated_blocks"] == 0
    return tokens


def run(
    engine: Engine, prompts: Mapping[str, ProcessedPrompt], params: SamplingParams | None = None
) -> dict[str, list[int]]:
    """Answer these prompts together."""
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, params or greedy())
    return drain(engine)


def alone(prompt: ProcessedPrompt, params: SamplingParams | None = None) -> list[int]:
    """The answer of a fresh, roomy engine without caches."""
    engine = make_engine(num_blocks=1024, max_model_len=2048, max_num_batched_tokens=4096, prefix=False)
    return run(engine, {"alone": prompt}, params)["alone"]
