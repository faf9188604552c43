"""transformers without its progress bars and warnings (what they say is checked and raised by those
who read), for one thread at a time: how loud it is belongs to the process, and so does what it
changes while it builds a model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

from veneer.files.process_wide import ALONE


@contextmanager
def quiet() -> Iterator[None]:
    """Errors only while inside; verbosity, progress bars and warning filters are as before
    afterwards. Other threads wait."""
    with ALONE:
        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()
