"""Records of row files, and the bounds of what is read.

A small file may hold more than any memory: compressed text, a column that names one long value of
its dictionary in every row, lists of a million values.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from veneer.data.examples import Problem, RowFault
from veneer.wording import first_names

Record = tuple[int, dict[str, Any]]
"""The line or number of a row, and its values by column."""
Records = Iterator[Record | Problem]

AS_WRITTEN = "D120"
"""Code of the problem that says how a file is read that another program wrote in its own way. It
refuses nothing."""
MAX_LINE_BYTES = 16 * 2**20
"""Bytes of a line of .jsonl or .csv, and of the values of a Parquet row."""
MAX_JSON_FILE_BYTES = 2**30
"""Bytes of a .json file, unpacked: it is read whole."""
MAX_COLUMNS = 10_000
"""Columns of a .csv or Parquet file."""
MAX_PARQUET_ROWS = 2**30
MAX_GROUP_VALUES = 2**26
"""Values of all columns in one row group of a Parquet file, without the first of each row. A row is
read whole, and takes about 24 bytes for each null in its lists, which takes none in the file."""
MAX_UNPACKED_RATIO, MIN_UNPACKED_BYTES = 1000, 2**28
"""Bytes to which each byte of a row group may unpack, if all are more than MIN_UNPACKED_BYTES: text
rarely shrinks to a hundredth."""
BATCH_ROWS, BATCH_BYTES = 1024, 64 * 2**20
"""Most rows and bytes that become Python values at a time."""


def check_columns(names: Sequence[str]) -> None:
    """Raises RowFault for too many columns of a file, and for several of one name."""
    if len(names) > MAX_COLUMNS:
        message = f"the file has {len(names):,} columns, the limit is {MAX_COLUMNS:,}"
        raise RowFault("D106", message, "Keep only the columns of the rows' texts.")
    if repeated := sorted(name for name, times in Counter(names).items() if times > 1):
        columns = first_names([repr(name) for name in repeated])
        raise RowFault("D105", f"two columns are called {columns}")
