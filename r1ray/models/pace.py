"""How much of prompts goes into a step, so that it takes no longer than it may.

What a token of a prompt takes depends on the model, the machine, and how far into a prompt it is:
it is measured, as what a step takes beyond one that only writes. Both are running means.
"""

from r1ray.ops.block_selection import BLOCK

__all__ = ["StepPace"]

_NEW = 0.5  # weight of the latest step
_MOST = 1 << 20


class StepPace:
    """Attributes:
    max_tokens: of prompts in the next step that also writes; at least a block's.

    Args:
        max_step_s: what a step may take.
    """

    def __init__(self, max_step_s: float) -> None:
        self._max_step_s = max_step_s
        self._write_s = 0.0
        self._token_s: float | None = None
        self.max_tokens = BLOCK

    def note(self, seconds: float, num_read: int, *, is_writing: bool) -> None:
        """A step took so long, with `num_read` tokens of prompts."""
        if not num_read:
            self._write_s += _NEW * (seconds - self._write_s)
        else:
            beside = self._write_s if is_writing else 0.0
            found = max(seconds - beside, 0.0) / num_read
            before = found if self._token_s is None else self._token_s
            self._token_s = before + _NEW * (found - before)
        if self._token_s:
            left = max(self._max_step_s - self._write_s, 0.0)
            self.max_tokens = min(max(BLOCK, int(left / self._token_s)), _MOST)
