"""Private parts of the Python interpreter. Tried with CPython 3.11 to 3.14."""

import atexit
import threading
from typing import Any


def finish_threads() -> None:
    """Waits for all threads that are not daemons, as the interpreter does at its end."""
    interpreter: Any = threading
    interpreter._shutdown()


def call_exit_functions() -> None:
    """Calls what was registered with atexit."""
    atexit._run_exitfuncs()


def referent_of(reference: Any) -> Any:
    """Returns the ctypes object of a reference that ctypes.byref made; None if it is none."""
    return getattr(reference, "_obj", None)
