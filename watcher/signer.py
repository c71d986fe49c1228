"""The commands that consumers of ours send, signed where the configuration has a secret."""

import time
from collections.abc import Callable
from typing import Any

from feed.signing import sign

_GOOD_FOR = 60  # seconds


def signer(secret: bytes | None) -> Callable[[str, str, dict[str, Any]], dict[str, Any]] | None:
    """What `Subscriber` takes as `sign`; None if there is no secret."""
    if secret is None:
        return None

    def signed(verb: str, host: str, document: dict[str, Any]) -> dict[str, Any]:
        return sign(secret, verb, host, document, int(time.time()) + _GOOD_FOR)

    return signed
