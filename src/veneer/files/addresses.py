"""Opens addresses that fsspec knows (s3://, hf://, file://, ...)."""

from typing import Any

from veneer.errors import ConfigError


def file_system(address: str) -> tuple[Any, str]:
    """Returns fsspec's file system of an address, and the path in it. Raises ConfigError if it
    fails.

    Cached listings of this process are dropped: files may have changed since. Opening some file
    systems uses the network or reads files, and each raises its own errors.
    """
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(address)
        fs.invalidate_cache()
    except ImportError as fault:
        step = "pip install 'veneer[remote]'"
        raise ConfigError(
            f"{address} needs a package that is not installed", [str(fault)], step
        ) from fault
    except Exception as fault:
        raise ConfigError(
            f"{address} is unknown to fsspec, or its server does not answer",
            [f"{type(fault).__name__}: {fault}".splitlines()[0][:300]],
            "Check the address, the network and your access rights.",
        ) from fault
    return fs, str(path)
