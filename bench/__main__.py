"""`python -m bench`: the benchmark, or the command that is named."""

import sys
from collections.abc import Sequence
from importlib import import_module

from bench import COMMANDS


def main(arguments: Sequence[str]) -> int:
    """Run the command with the arguments after its name; return its exit status."""
    # Only what is run is loaded: each needs packages of its own, and some take seconds.
    if arguments and arguments[0] in COMMANDS:
        status: int = import_module(COMMANDS[arguments[0]]).main(arguments[1:])
    else:
        status = import_module("bench.compare").main(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
