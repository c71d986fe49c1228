"""What can go wrong, by who must act.

    SnapfeedError
    ├── OperatorError    somebody has to change something: a config, a command, a mount, a permission; its text names the
    │                    thing and the remedy; trying again without that is of no use
    ├── TransientError   the world may mend itself: a device error, a vanished mount, a full disk; tried again later
    └── DamageError      a store does not hold what it must (a system file, a send stream); it is set aside, never guessed at

Anything else that is raised is a bug of ours and is let through.
"""


class SnapfeedError(Exception):
    """Base of all errors that are not bugs."""


class OperatorError(SnapfeedError):
    """A person has to act; the text says on what and how."""


class TransientError(SnapfeedError):
    """May pass by itself; the caller tries again later and says so in the partition's state."""


class DamageError(SnapfeedError):
    """What was read cannot be what was written."""
