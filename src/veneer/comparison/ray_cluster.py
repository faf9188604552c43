"""Connects to a Ray cluster. Ray is an extra, imported only on use.

Whoever may connect to a cluster can run code on it. A cluster started here listens on all addresses
of this machine, as Ray does, and accepts only clients with its token: Ray makes it, in this user's
home (2.59 and later).
"""

import logging
from types import ModuleType

from veneer.errors import ConfigError, SourceError
from veneer.private.ray import silence_workers


def connect(address: str | None) -> ModuleType:
    """Returns Ray, connected to `address`, or to a cluster that is started here and ends with this
    process.

    Raises ConfigError if Ray is not installed, SourceError if no cluster answers.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError("Ray is not installed", next_step="pip install 'veneer[ray]'") from None
    if ray.is_initialized():
        return ray
    try:
        if address is None:
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        else:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as fault:
        raise SourceError(
            "no Ray cluster " + (f"answers at {address}" if address else "could be started here"),
            [line for line in str(fault).splitlines() if line.strip()][:3],
            "Start one (ray start --head) and name it; without --address one is started here.",
        ) from None
    silence_workers(ray)
    return ray
