"""What can go wrong that a user can mend; the command line prints these without a traceback.

    VeneerError                     exit code
    ├─ InputError                   2    what the user gave is wrong
    │  ├─ ConfigError                    a run file, a flag, a method's settings
    │  │  └─ UnknownNameError               an adapter or a base of that name is not there
    │  ├─ DataError                      rows, templates, masks
    │  └─ SourceError                    a base or an adapter that cannot be found or read
    ├─ DoesNotFitError              3    memory or disk
    │  └─ BudgetFullError                adapters that stay leave no room for another
    ├─ RefusedError                 4    a check said no
    │  ├─ QueueFullError                 as many requests wait as may
    │  ├─ AdapterMismatchError           this adapter was made for another base
    │  ├─ UnsafeFileError                pickles, code from models, paths that climb
    │  └─ CorruptFileError               hashes, shapes, non-finite values, truncated files
    ├─ DivergedError                5    the loss or the gradient is not finite
    ├─ LostProcessError             6    another process of the run failed, or is gone
    └─ Interrupted                  130  stopped by the user, with a checkpoint

An `assert` is for what only we can break; everything here is for what a user meets.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

LONGEST_LINE = 2000
"""Characters of a headline or a fault."""


class VeneerError(Exception):
    """One headline, every fault found, and what to do next.

    headline   what failed, one line
    faults     all of them, not the first: one line each
    next_step  the command or the change that mends it
    """

    exit_code = 1

    def __init__(self, headline: str, faults: Sequence[str] = (), next_step: str = "") -> None:
        self.headline, self.faults, self.next_step = (
            _cut(headline),
            [_cut(each) for each in faults],
            next_step,
        )
        lines = [self.headline + (":" if self.faults else "")]
        lines += [f"  {fault}" for fault in self.faults]
        lines += [next_step] if next_step else []
        super().__init__("\n".join(lines))


def _cut(line: str) -> str:
    """What a stranger's file says may stand in a line, and be a million characters long."""
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
    """waiting: requests that wait; most: that may."""

    def __init__(self, waiting: int, most: int) -> None:
        self.waiting, self.most = waiting, most
        super().__init__(
            f"{waiting:,} requests wait, {most:,} may", next_step="Ask again in a moment."
        )


class AdapterMismatchError(RefusedError): ...


class UnsafeFileError(RefusedError): ...


class CorruptFileError(RefusedError): ...


class DivergedError(VeneerError):
    exit_code = 5


class LostProcessError(VeneerError):
    exit_code = 6


class Interrupted(VeneerError):
    exit_code = 130


_OUT_OF_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
)


def is_out_of_memory(fault: Exception) -> bool:
    """torch has a class of its own for this on some devices only; elsewhere, and in safetensors,
    the text says so."""
    text = str(fault).lower()
    return isinstance(fault, MemoryError) or any(said in text for said in _OUT_OF_MEMORY)


def missing_on_device(fault: Exception) -> RefusedError | None:
    """What to raise instead where torch has no operation or no type on Apple's MPS, by its name;
    None: not that."""
    said = str(fault).strip()
    if not isinstance(fault, NotImplementedError | TypeError | RuntimeError) or "MPS" not in said:
        return None
    return RefusedError(
        "torch cannot compute this on Apple's MPS",
        [said.splitlines()[0].partition(". ")[0]],
        "Take --device cpu; or set PYTORCH_ENABLE_MPS_FALLBACK=1, and the CPU computes what MPS"
        " lacks, slowly.",
    )


@contextmanager
def told_as(place: object, name: str) -> Iterator[None]:
    """Errors of the block call a place by a name: who is told of them elsewhere is not told where
    it is."""

    def said(line: str) -> str:
        return line.replace(str(place), name)

    try:
        yield
    except VeneerError as fault:
        VeneerError.__init__(
            fault, said(fault.headline), [*map(said, fault.faults)], said(fault.next_step)
        )
        raise


@contextmanager
def fits_memory(doing: str, faults: Sequence[str] = (), next_step: str = "") -> Iterator[None]:
    """What does not fit within the block as a DoesNotFitError: out of memory `doing` this."""
    try:
        yield
    except VeneerError:
        raise
    except Exception as fault:
        if not is_out_of_memory(fault):
            raise
        raise DoesNotFitError(f"out of memory {doing}", faults, next_step) from fault
