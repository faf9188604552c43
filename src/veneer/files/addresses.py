"""Addresses that fsspec knows (s3://, hf://, file://, ...): what stands behind one."""

from __future__ import annotations

from typing import Any

from veneer.errors import ConfigError


def file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it. ConfigError: there is none.

    Listings that an earlier use in this process left are dropped: files may have changed since.
    Some are looked up on the network, or read a file, to be made: each raises errors of its own.
    """
    import fsspec

    try:
        found, path = fsspec.core.url_to_fs(address)
        found.invalidate_cache()
    except ImportError as fault:
        step = "pip install 'veneer[remote]'"
        raise ConfigError(
            f"{address} needs a package that is not installed", [str(fault)], step
        ) from fault
    except Exception as fault:
        raise ConfigError(
            f"{address} is no address that fsspec knows, or nothing answers there",
            [f"{type(fault).__name__}: {fault}".splitlines()[0][:300]],
            "Look at the address, the network and your right to read it.",
        ) from fault
    return found, str(path)
