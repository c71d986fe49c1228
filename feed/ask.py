"""A command to be sent to a daemon, as a value."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Ask:
    """`document` has its `id`; a signature, if one is wanted, is added when it is sent."""

    host: str
    verb: str
    document: dict[str, Any]

    @property
    def id(self) -> str:
        return str(self.document["id"])
