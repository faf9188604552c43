"""The error with which one of several jobs ends, while the others go on."""

import traceback

from veneer.errors import DoesNotFitError, VeneerError, is_out_of_memory, missing_on_device
from veneer.files.system_errors import refusal


def error_of(fault: Exception) -> VeneerError:
    """Returns an error itself, or one that says the same and holds no frames, so no tensors.

    That of a bug has the lines of code that led to it as its faults.
    """
    if isinstance(fault, VeneerError):
        return fault
    if is_out_of_memory(fault):
        return DoesNotFitError("out of memory")
    if (refused := refusal(fault) or missing_on_device(fault)) is not None:
        return refused.with_traceback(None)
    frames = traceback.extract_tb(fault.__traceback__)
    return VeneerError(
        f"this is a bug in Veneer: {type(fault).__name__}: {fault}",
        [f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in frames],
    )
