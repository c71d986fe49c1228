r"""Signed commands: a shared secret says who may command, where a broker's ACL is not enough. Pure; time is an argument.

A signed command carries `expires` (seconds since the epoch) and `signature`: the HMAC-SHA256, in hexadecimal, of

    verb "\n" host "\n" document

where `document` is the command without `signature` as JSON with sorted keys, no blanks and characters as they are (UTF-8), so
that it holds for one command, one host and some minutes. Sent again within them, the command's `id` shows it.
"""

import hmac
from collections.abc import Mapping
from typing import Any

import orjson

from comparer.errors import OperatorError

LONGEST = 3600  # seconds a signature may be good for
SHORTEST_SECRET = 16  # bytes


def signature(secret: bytes, verb: str, host: str, document: Mapping[str, Any]) -> str:
    """What `signature` must be."""
    plain = {key: value for key, value in document.items() if key != "signature"}
    text = b"\n".join((verb.encode(), host.encode(), orjson.dumps(plain, option=orjson.OPT_SORT_KEYS)))
    return hmac.new(secret, text, "sha256").hexdigest()


def sign(secret: bytes, verb: str, host: str, document: Mapping[str, Any], expires: int) -> dict[str, Any]:
    """The command with `expires` and `signature`."""
    signed = {**document, "expires": expires}
    return {**signed, "signature": signature(secret, verb, host, signed)}


def why_not(secret: bytes, verb: str, host: str, document: Mapping[str, Any], now: float) -> str | None:
    """What is wrong with a command's signature, None if it is good. `now`: seconds since the epoch."""
    given, expires = document.get("signature"), document.get("expires")
    if not isinstance(given, str) or isinstance(expires, bool) or not isinstance(expires, int):
        return "the command must be signed: `expires` (a number) and `signature` (a text) are missing"
    if not hmac.compare_digest(given.encode(), signature(secret, verb, host, document).encode()):
        return "the signature is wrong: another secret, verb, host or content"
    if expires < now:
        return "the signature has expired; are the clocks right?"
    if expires > now + LONGEST:
        return f"`expires` lies more than {LONGEST} s ahead; are the clocks right?"
    return None


def read_secret(path: str, what: str = "[commands] secret_file") -> bytes:
    """The secret in a file, without a newline at its end. Raises OperatorError."""
    try:
        with open(path, "rb") as file:
            secret = file.read(4096).rstrip(b"\r\n")
    except OSError as error:
        raise OperatorError(f"{what}: {path!r}: {error.strerror}; give the path of a readable file") from error
    if len(secret) < SHORTEST_SECRET:
        raise OperatorError(f"{what}: {path!r} holds {len(secret)} bytes; a secret has at least {SHORTEST_SECRET}")
    return secret
