"""How many connections the limit of open files allows."""

from contextlib import suppress

from veneer.serve.limits import MOST_CONNECTIONS

RESERVED_FILES = 96
"""Files that the process needs beside its connections: a base's and adapters', pipes to the
template's process."""
MOST_AT_ONCE = 256


def raise_open_files() -> None:
    """Raises the process's limit of open files to what MOST_CONNECTIONS need, or to the hard limit.

    A shell often allows 1,024, although the system allows many more.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * MOST_CONNECTIONS + RESERVED_FILES
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    with suppress(ValueError, OSError):  # macOS has a further limit that it does not report
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def room_for_connections() -> tuple[int, int]:
    """Returns how many connections may be open, and how many may be accepted at once.

    If accepting fails because no file is left, asyncio tries again as often as it may accept at
    once, with a traceback each, and answers nobody. Some turns of the event loop pass until an
    accepted connection is counted.
    """
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except ImportError:  # Windows has none
        return MOST_CONNECTIONS, MOST_AT_ONCE
    if limit == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS, MOST_AT_ONCE
    free = max(limit - RESERVED_FILES, 16)
    return min(free // 2, MOST_CONNECTIONS), min(free // 8, MOST_AT_ONCE)
