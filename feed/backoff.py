"""How long to wait before trying again: exponential, capped, with full jitter, so that many hosts do not come back at once."""

import random
from collections.abc import Callable


class Backoff:
    """Delays in seconds: uniform between 0 and `first`, twice that, ... at most `cap`."""

    def __init__(
        self, first: float = 1.0, cap: float = 30.0, uniform: Callable[[float, float], float] | None = None
    ) -> None:
        self._first, self._cap = first, cap
        self._uniform = uniform or random.SystemRandom().uniform
        self._failures = 0

    def delay(self) -> float:
        """The delay after one more failure."""
        bound = min(self._cap, self._first * 2 ** min(self._failures, 32))
        self._failures += 1
        return self._uniform(0.0, bound)

    def reset(self) -> None:
        """It worked: begin small again."""
        self._failures = 0
