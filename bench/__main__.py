"""`python -m bench`: the benchmark, or the command that is named."""

import sys
from collections.abc import Sequence
from importlib import import_module

from bench import COMMANDS


def main(arguments: Sequence[str]) -> int:
    """Run the command with the arguments after its name; return its exit status."""
    name, rest = "bench.run", arguments
    if arguments and arguments[0] in COMMANDS:
        name, rest = COMMANDS[arguments[0]], arguments[1:]
    status: int = import_module(name).main(rest)  # Only what is run is loaded: some take seconds.
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
