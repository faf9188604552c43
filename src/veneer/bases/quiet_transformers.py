"""Silences transformers' progress bars and warnings; readers check and raise what they report.

Verbosity belongs to the process, so one thread at a time does this.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

from veneer.files.process_wide import ALONE


@contextmanager
def quiet() -> Iterator[None]:
    """Shows only errors inside the block; verbosity, progress bars and warning filters are
    restored. Other threads wait."""
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
