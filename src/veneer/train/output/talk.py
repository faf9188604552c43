"""The console on which people are told what goes on while work is done."""

import sys
from typing import Any

from rich.console import Console

from veneer.train.output.streams import Talk


def talking_console(*, stderr: bool) -> Console:
    """Never fails, whatever becomes of the stream, and never guesses markup in foreign text."""
    stream: Any = Talk(sys.stderr if stderr else sys.stdout)
    return Console(file=stream, highlight=False, markup=False, emoji=False)
