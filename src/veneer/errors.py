"""Errors that a user can fix; the command line prints them without a traceback.

VeneerError                     exit code
├─ InputError                   2    the user's input is wrong
│  ├─ ConfigError                    a run file, a flag, a method's settings
│  │  └─ UnknownNameError               there is no adapter or base of that name
│  ├─ DataError                      rows, templates, masks
│  └─ SourceError                    a base or an adapter that cannot be found or read
├─ DoesNotFitError              3    memory or disk
│  └─ BudgetFullError                adapters that stay leave no room for another
├─ RefusedError                 4    a check refused
│  ├─ QueueFullError                 the queue of waiting requests is full
│  ├─ QuotaError                     the limit of jobs, files or their disk space is reached
│  ├─ AdapterMismatchError           this adapter was made for another base
│  ├─ UnsafeFileError                pickles, code from models, paths out of a folder
│  └─ CorruptFileError               hashes, shapes, non-finite values, truncated files
├─ DivergedError                5    the loss or the gradient is not finite
├─ LostProcessError             6    another process of the run failed or disappeared
└─ RunInterrupted               130  stopped by the user, with a checkpoint

`assert` is for bugs of Veneer; these errors are for everything that a user may meet.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

LONGEST_LINE = 2000
"""Most characters of a headline or a fault."""


class VeneerError(Exception):
    """An error with one headline, every fault, and the next step.

    headline   what failed, one line
    faults     all of them, one line each
    next_step  the command or change that fixes it
    """

    exit_code = 1

    def __init__(self, headline: str, faults: Sequence[str] = (), next_step: str = "") -> None:
        self.headline, self.faults, self.next_step = (
            _shorten(headline),
            [_shorten(fault) for fault in faults],
            next_step,
        )
        lines = [self.headline + (":" if self.faults else "")]
        lines += [f"  {fault}" for fault in self.faults]
        lines += [next_step] if next_step else []
        super().__init__("\n".join(lines))

    def lines_about(self, name: str) -> list[str]:
        """Returns the headline and the faults, each behind the name of what they are about."""
        return [f"{name}: {line}" for line in (self.headline, *self.faults)]


def fault_lines(fault: BaseException, most: int = 3) -> list[str]:
    """Returns the first lines of another library's message, each after the name of its class."""
    return [f"{type(fault).__name__}: {line}" for line in str(fault).splitlines()[:most]]


def first_line(fault: BaseException, characters: int = 200) -> str:
    """Returns the class of a fault and the first line of its message, shortened."""
    return f"{type(fault).__name__}: {fault}".strip().splitlines()[0][:characters]


def _shorten(line: str) -> str:
    """Shortens a line: it may quote a file, and be a million characters long."""
    return line if len(line) <= LONGEST_LINE else line[:LONGEST_LINE] + "…"


class InputError(VeneerError):
    exit_code = 2


class ConfigError(InputError): ...


class UnknownNameError(ConfigError): ...


class DataError(InputError): ...


class SourceError(InputError): ...


class DoesNotFitError(VeneerError):
    exit_code = 3


class BudgetFullError(DoesNotFitError): ...


class RefusedError(VeneerError):
    exit_code = 4


class QueueFullError(RefusedError):
    """The queue is full. waiting: number of waiting requests; most: limit"""

    def __init__(self, waiting: int, most: int) -> None:
        self.waiting, self.most = waiting, most
        super().__init__(
            f"{waiting:,} requests are waiting, the limit is {most:,}",
            next_step="Try again in a moment.",
        )


class QuotaError(RefusedError): ...


class AdapterMismatchError(RefusedError): ...


class UnsafeFileError(RefusedError): ...


class CorruptFileError(RefusedError): ...


class DivergedError(VeneerError):
    exit_code = 5


class LostProcessError(VeneerError):
    exit_code = 6


class RunInterrupted(VeneerError):
    exit_code = 130


_OUT_OF_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
)


def is_out_of_memory(fault: Exception) -> bool:
    """Whether the error means out of memory.

    torch has a class for this on some devices only; elsewhere, and in safetensors, the text tells.
    """
    text = str(fault).lower()
    return isinstance(fault, MemoryError) or any(words in text for words in _OUT_OF_MEMORY)


def missing_on_device(fault: Exception) -> RefusedError | None:
    """Returns the error for an operation or type that torch lacks on Apple's MPS, else None."""
    message = str(fault).strip()
    if (
        not isinstance(fault, NotImplementedError | TypeError | RuntimeError)
        or "MPS" not in message
    ):
        return None
    return RefusedError(
        "torch cannot compute this on Apple's MPS",
        [message.splitlines()[0].partition(". ")[0]],
        "Use --device cpu; or set PYTORCH_ENABLE_MPS_FALLBACK=1, and the CPU computes what MPS"
        " lacks, slowly.",
    )


@contextmanager
def hide_path(path: object, name: str) -> Iterator[None]:
    """Replaces a path by a name in errors of the block, for readers who must not see the path."""

    def renamed(line: str) -> str:
        return line.replace(str(path), name)

    try:
        yield
    except VeneerError as fault:
        VeneerError.__init__(
            fault, renamed(fault.headline), [*map(renamed, fault.faults)], renamed(fault.next_step)
        )
        raise


@contextmanager
def fits_memory(doing: str, next_step: str = "") -> Iterator[None]:
    """Raises DoesNotFitError if the block runs out of memory. doing: the activity, for the
    message"""
    try:
        yield
    except VeneerError:
        raise
    except Exception as fault:
        if not is_out_of_memory(fault):
            raise
        raise DoesNotFitError(f"out of memory {doing}", next_step=next_step) from fault
