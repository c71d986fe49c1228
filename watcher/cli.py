"""The command `snapfeed`: what is run, and how errors become exit codes (0 done, 1 it went wrong, 2 wrongly called)."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

from comparer.errors import SnapfeedError

from .missing import explained

try:
    from .arguments import build, wrong
    from .said import describe
except ModuleNotFoundError as _error:
    sys.exit(explained(_error))

Command = Callable[[argparse.Namespace], int]


def imported(run: str) -> Command:
    """`module.function` of this package. Only what is run is imported: the daemon does not carry the others in its memory."""
    module, _, function = run.partition(".")
    found: ModuleType
    match module:
        case "command_ask":
            from . import command_ask

            found = command_ask
        case "command_disk":
            from . import command_disk

            found = command_disk
        case "command_export":
            from . import command_export

            found = command_export
        case "command_remove":
            from . import command_remove

            found = command_remove
        case "command_replicate":
            from . import command_replicate

            found = command_replicate
        case "command_run":
            from . import command_run

            found = command_run
        case "command_tail":
            from . import command_tail

            found = command_tail
        case _:
            from . import command_verify

            found = command_verify
    command: Command = getattr(found, function)
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    options = build().parse_args(arguments)
    why = wrong(options)
    if why is not None:
        options.parser.error(why)
    try:
        return int(imported(options.run)(options))
    except SnapfeedError as error:
        print(f"snapfeed {options.command}: {describe(error)}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(explained(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
