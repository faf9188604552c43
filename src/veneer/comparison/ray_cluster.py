"""A Ray cluster that this process is connected to. Ray is an extra: nothing here imports it before
it is asked for.

Whoever may talk to a cluster runs what they like on it. One that is started here listens where Ray
listens, on all of this machine's addresses, and answers who knows its token: Ray makes it, in this
user's home (2.59 and later).
"""

from __future__ import annotations

import logging
from types import ModuleType

from veneer.errors import ConfigError, SourceError


def connect(address: str | None) -> ModuleType:
    """Ray, connected to the cluster at `address`, or to one that is started on this machine and
    ends with us.

    ConfigError: Ray is not installed. SourceError: no cluster answers there.
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
    ray._private.worker._worker_logs_enabled = (
        False  # or it writes on stdout, between what --json prints
    )
    return ray
