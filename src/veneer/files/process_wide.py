"""Settings of the process that somebody changes for a while, for one thread at a time: torch's
default type and how values are drawn, as transformers builds a model; torch's threads, as the
processor is measured.

Two threads that build at once would build by each other's settings, and leave the process with
them.
"""

import threading

ALONE = threading.RLock()
"""Around what changes them, and around what must not meet them changed. Taken after a base's own
locks."""
