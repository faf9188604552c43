"""Locks settings of the whole process while one thread changes them.

These are torch's default type and initialisation while transformers builds a model, and torch's
threads while the processor is measured. Two threads that build at once would use each other's
settings, and could leave them changed.
"""

import threading

ALONE = threading.RLock()
"""Held while these settings are changed or must be unchanged. Acquired after a base's own locks."""
