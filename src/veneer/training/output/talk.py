"""The console on which people are told what goes on while work is done."""

import sys
from typing import Any

from rich.console import Console

from veneer.training.output.streams import LogStream


def talking_console(*, stderr: bool) -> Console:
    """Never fails, whatever becomes of the stream, and never guesses markup in foreign text."""
    stream: Any = LogStream(sys.stderr if stderr else sys.stdout)
    return Console(file=stream, highlight=False, markup=False, emoji=False)
