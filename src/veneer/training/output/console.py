"""The console for messages during work."""

import sys
from typing import Any

from rich.console import Console

from veneer.training.output.streams import LogStream


def log_console(*, stderr: bool) -> Console:
    """Returns a console that never fails and treats text as plain, without markup."""
    stream: Any = LogStream(sys.stderr if stderr else sys.stdout)
    return Console(file=stream, highlight=False, markup=False, emoji=False)
