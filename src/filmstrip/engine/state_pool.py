"""Slots of recurrent state: who runs in which, and which hold the state after a known beginning; knows no tensors.

A model with linear attention keeps, beside K and V, one state for each request, which every token overwrites. It cannot be
cut back to an earlier token, so a prompt's cached beginning can be taken up only where its state was copied aside.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class StatePool:
    """``num_running`` slots that requests compute in and ``num_checkpoints`` slots that hold copies.

    A checkpoint is named by the hash of the block it ends with, which covers everything before it. Checkpoints where other
    prompts are likely to part from this one (``is_likely``) are kept before those that merely happened at the end of a
    chunk: one long prompt must not drive out all others. Among equals the least recently used goes first.
    """

    def __init__(self, num_running: int, num_checkpoints: int) -> None:
        self.num_running, self.num_checkpoints = num_running, num_checkpoints
        self._free_running = list(range(num_running))
        self._free_checkpoints = list(range(num_running, num_running + num_checkpoints))
        self._likely: OrderedDict[bytes, int] = OrderedDict()
        self._passing: OrderedDict[bytes, int] = OrderedDict()
        self._copies: list[tuple[int, int]] = []

    @property
    def num_slots(self) -> int:
        """All slots there are."""
        return self.num_running + self.num_checkpoints

    @property
    def num_kept(self) -> int:
        """Checkpoints that can be found."""
        return len(self._likely) + len(self._passing)

    def acquire(self, checkpoint: bytes | None) -> int:
        """A slot to run in: of unknown content, or (after :meth:`take_copies`) with the state of ``checkpoint``.

        Raises ValueError if all are taken or the checkpoint is not there; the caller has looked.
        """
        if not self._free_running:
            raise ValueError(f"all {self.num_running} states are taken")
        slot = self._free_running.pop()
        if checkpoint is not None:
            source = self._passing.pop(checkpoint, None)
            source = self._likely.pop(checkpoint, None) if source is None else source
            if source is None:
                self._free_running.append(slot)
                raise ValueError("the checkpoint is not kept any more")
            self._likely[checkpoint] = source  # it was of use: now it is the last to go
            self._copies.append((source, slot))
        return slot

    def release(self, slot: int) -> None:
        """Let another request run in ``slot``; a copy into it that was not made yet is not made any more."""
        if slot in self._free_running or not 0 <= slot < self.num_running:
            raise ValueError(f"no request runs in slot {slot}")
        self._free_running.append(slot)
        self._copies = [copy for copy in self._copies if copy[1] != slot]

    def take_copies(self) -> list[tuple[int, int]]:
        """(source, target) of the copies to make before the next forward pass; each is handed out once."""
        copies, self._copies = self._copies, []
        return copies

    def has(self, checkpoint: bytes) -> bool:
        """Whether the state at the end of this block is kept."""
        return checkpoint in self._likely or checkpoint in self._passing

    def keep(self, checkpoint: bytes, *, is_likely: bool) -> int | None:
        """A slot to copy a state to, findable by this name from now on; None if it is there or nothing may make room."""
        if self.has(checkpoint):
            return None
        if self._free_checkpoints:
            slot = self._free_checkpoints.pop()
        elif self._passing:
            _, slot = self._passing.popitem(last=False)
        elif self._likely and is_likely:
            _, slot = self._likely.popitem(last=False)
        else:
            return None
        (self._likely if is_likely else self._passing)[checkpoint] = slot
        return slot

    def disown(self, checkpoints: Iterable[bytes]) -> None:
        """Let nobody find these states any more."""
        for checkpoint in checkpoints:
            for kept in (self._likely, self._passing):
                if checkpoint in kept:
                    self._free_checkpoints.append(kept.pop(checkpoint))

    def check_integrity(self, running: Iterable[int]) -> None:
        """Raise AssertionError unless every slot is free, kept or run in by exactly one request (for tests)."""
        kept = [*self._likely.values(), *self._passing.values()]
        assert sorted([*self._free_running, *running]) == list(range(self.num_running)), "a running state is lost"
        assert sorted([*self._free_checkpoints, *kept]) == list(range(self.num_running, self.num_slots)), (
            "a checkpoint's slot is lost"
        )
        assert not set(self._likely) & set(self._passing), "a checkpoint is kept twice"
