"""Logits to tokens, each request by its own parameters; knows no model and no blocks.

Rows never influence each other: every random draw comes from the request's own generator, so an answer does not depend on
who else is in the batch. Order of operations and meaning of the parameters are vLLM's: penalties, temperature, min_p, top_k,
top_p. Ties go to the lowest token id.
"""

from __future__ import annotations

import torch

from filmstrip.types import SamplingParams

GREEDY_BELOW = 1e-5
"""Temperatures below this are taken as 0: dividing by them overflows, and the likeliest token is all that is left."""
_PIECE = 128
_SMALLEST_FACTOR = 1e-30
"""Repetition penalties below this would be 0 in single precision, and their quotients not numbers."""


class SamplingState:
    """What sampling remembers about one request between steps."""

    def __init__(self, params: SamplingParams, prompt_token_ids: list[int], vocab_size: int, seed: int) -> None:
        self.params = params
        self.generator: torch.Generator | None = None
        if params.temperature >= GREEDY_BELOW:
            self.generator = torch.Generator().manual_seed((params.seed if params.seed is not None else seed) % 2**63)
        self._output_counts: torch.Tensor | None = None
        self._seen: torch.Tensor | None = None
        if params.presence_penalty or params.frequency_penalty:
            self._output_counts = torch.zeros(vocab_size)
        if params.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool)
            # A prompt may carry ids of placeholders outside the vocabulary; they have no logit to change.
            self._seen[[token for token in set(prompt_token_ids) if 0 <= token < vocab_size]] = True

    @property
    def is_plain(self) -> bool:
        """Whether the token is simply the likeliest."""
        return self.generator is None and self._seen is None and self._output_counts is None

    def observe(self, token: int) -> None:
        """Count a generated token."""
        if self._output_counts is not None:
            self._output_counts[token] += 1
        if self._seen is not None:
            self._seen[token] = True

    def penalise(self, logits: torch.Tensor) -> torch.Tensor:
        """One row of fp32 logits (vocab_size,) with the request's penalties; the row itself if it has none.

        Repetition divides positive and multiplies negative logits of every token seen in prompt or answer (Keskar et al.
        2019, CTRL); frequency and presence are subtracted for tokens of the answer (OpenAI's definition).
        """
        params = self.params
        if self._seen is not None:
            factor = max(params.repetition_penalty, _SMALLEST_FACTOR)
            penalised = torch.where(logits > 0, logits / factor, logits * factor)
            logits = torch.where(self._seen.to(logits.device), penalised, logits)
        if self._output_counts is not None:
            counts = self._output_counts.to(logits.device)
            logits = logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
        if self._seen is None and self._output_counts is None:
            return logits
        return logits.clamp(max=torch.finfo(logits.dtype).max)


def sample(logits: torch.Tensor, states: list[SamplingState]) -> list[int | None]:
    """One token per row of fp32 ``logits`` (R, vocab_size); None for a row with NaN, +inf or nothing finite.

    Greedy rows are taken together; the others one by one, which costs little beside the forward pass that made them.
    """
    if not states:
        return []
    highest, likeliest = logits.max(-1)
    usable, likeliest = torch.isfinite(highest).tolist(), likeliest.tolist()
    tokens: list[int | None] = []
    for row, state in enumerate(states):
        if not usable[row]:
            tokens.append(None)
        elif state.is_plain:
            tokens.append(likeliest[row])
        elif state.generator is None:
            tokens.append(int(state.penalise(logits[row]).argmax()))
        else:
            tokens.append(_draw(state.penalise(logits[row]), state.params, state.generator))
    return tokens


def _draw(logits: torch.Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Draw from softmax(logits / temperature), cut by min_p, top_k and top_p."""
    tokens = _candidates(logits, params.top_k) if 0 < params.top_k < len(logits) else None
    if tokens is not None:
        logits = logits[tokens]
    logits = logits.cpu()
    probabilities = torch.softmax((logits - logits.max()) / params.temperature, -1)
    if params.min_p > 0:
        probabilities[probabilities < params.min_p * probabilities.max()] = 0
    if tokens is None:
        if params.top_p >= 1:
            return _pick(probabilities, generator)
        # Tokens less likely than this have at most the probability 1 - top_p all together: the others reach top_p. Sorting
        # only those is much faster than sorting a whole vocabulary. (Half of it, because sums are rounded.)
        lowest = probabilities.sum() * ((1 - params.top_p) / len(probabilities) / 2)
        tokens = torch.nonzero(probabilities >= lowest).flatten()
        total, probabilities = probabilities.sum(), probabilities[tokens]
    else:
        tokens, total = tokens.cpu(), None
    # Likeliest first, equals by id.
    values, order = torch.sort(probabilities, descending=True, stable=True)
    if params.top_k > 0:
        values = values[: params.top_k]
    if params.top_p < 1:
        values = values / (values.sum() if total is None else total)
        # Keep the smallest set that reaches top_p: a token stays if what stands before it does not reach it yet. The
        # likeliest always stays, even where top_p is 0 in single precision.
        values[1:][(values.cumsum(-1) - values)[1:] >= params.top_p] = 0
    return int(tokens[order[_pick(values, generator)]])


def _candidates(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Ids, ascending, of all tokens at least as likely as the ``count``-th likeliest, and perhaps of some more.

    The largest values of ``count`` pieces of the row are ``count`` values, so the ``count``-th largest of the row is not
    less than the smallest of them. That bound costs one pass over a vocabulary; selecting in it costs many times more.
    """
    whole = len(logits) // _PIECE * _PIECE
    maxima = torch.cat([logits[:whole].view(-1, _PIECE).amax(-1), logits[whole:]])
    if len(maxima) < count:
        maxima = logits
    return torch.nonzero(logits >= torch.topk(maxima, count).values[-1]).flatten()


def _pick(weights: torch.Tensor, generator: torch.Generator) -> int:
    """An index with a chance in proportion to its weight: where one uniform number falls in the running sum.

    The sum is kept in double precision: over a vocabulary, single precision would lose the small ones.
    """
    sums = weights.cumsum(-1, dtype=torch.float64)
    place = torch.rand(1, generator=generator, dtype=torch.float64) * sums[-1]
    # The first sum beyond the place; rounding may put the place on the very end, where the last token with a chance is.
    return min(int(torch.searchsorted(sums, place, right=True)), int(torch.searchsorted(sums, sums[-1])))
