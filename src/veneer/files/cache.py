"""Locates Veneer's cache folder of downloads and conversions."""

import os
import sys
from pathlib import Path

from veneer.files.home import expanded, home

CACHE_STEP = "Free some space, or set VENEER_CACHE to a writable folder with enough space."


def cache_folder() -> Path:
    """Returns $VENEER_CACHE, or Veneer's folder in the platform's cache folder."""
    if chosen := os.environ.get("VENEER_CACHE"):
        return expanded(chosen).absolute()
    if sys.platform == "darwin":
        return home() / "Library" / "Caches" / "veneer"
    if sys.platform == "win32":
        return (
            Path(os.environ.get("LOCALAPPDATA") or home() / "AppData" / "Local")
            / "veneer"
            / "cache"
        )
    return Path(os.environ.get("XDG_CACHE_HOME") or home() / ".cache") / "veneer"
