"""Reads the records of a Parquet file, within the bounds of records.py.

Row groups are checked by the file's metadata before they are read. Values stay indices into their
dictionaries until their rows are known to be small enough.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from veneer.data.examples import Problem, RowFault
from veneer.data.files.records import (
    BATCH_BYTES,
    BATCH_ROWS,
    MAX_GROUP_VALUES,
    MAX_LINE_BYTES,
    MAX_PARQUET_ROWS,
    MAX_UNPACKED_RATIO,
    MIN_UNPACKED_BYTES,
    Records,
    check_columns,
)
from veneer.files.nesting import TOO_DEEP, too_deep

Sizes = NDArray[np.int64]
VALUE_BYTES = 8
"""Bytes that count for each value beside its content."""
SMALLER_GROUPS = "Write the file with smaller row groups, or as .jsonl."


def read_parquet(stream: BinaryIO, file: str) -> Records:
    """Yields the records of a Parquet file and its problems."""
    number = 0
    try:
        with _readable():
            for batch, sizes in _batches(stream):
                parts = np.cumsum(sizes) // BATCH_BYTES
                starts = [0, *(np.flatnonzero(np.diff(parts)) + 1).tolist(), len(sizes)]
                for start, end in pairwise(starts):
                    yield from _records(batch, sizes, start, end, number, file)
                number += len(sizes)
    except RowFault as fault:
        yield Problem(fault.code, file, fault.message, next_step=fault.next_step)


def holds_more_than(stream: BinaryIO, most: int) -> bool:
    """Returns whether the values of a Parquet file take more bytes than this. Raises RowFault if it
    cannot be read."""
    held = 0
    with _readable():
        for _, sizes in _batches(stream):
            held += int(sizes.sum())
            if held > most:
                return True
    return False


def _records(batch: Any, sizes: Sizes, start: int, end: int, number: int, file: str) -> Records:
    """Yields the rows from `start` to `end` of a batch. number: of rows before the batch"""
    if end - start > 1 and sizes[start:end].max() > MAX_LINE_BYTES:
        for place in range(start, end):
            yield from _records(batch, sizes, place, place + 1, number, file)
    elif sizes[start] > MAX_LINE_BYTES:
        message = f"the row is longer than {MAX_LINE_BYTES // 2**20} MiB"
        yield Problem("D106", file, message, (number + start + 1,))
    else:
        records = batch.slice(start, end - start).to_pylist()
        for row, record in enumerate(records, number + start + 1):
            if too_deep(record):
                yield Problem("D103", file, TOO_DEEP, (row,))
            else:
                yield row, _without_nulls(record)


@contextmanager
def _readable() -> Iterator[None]:
    """Raises RowFault for errors of pyarrow, and if it is missing."""
    try:
        from pyarrow import ArrowException
    except ImportError:
        raise RowFault(
            "D100", "reading Parquet needs the package pyarrow", "pip install 'veneer[parquet]'"
        ) from None
    try:
        yield
    except (ArrowException, ValueError) as error:
        raise RowFault("D100", f"the Parquet file cannot be read: {error}") from None


def _batches(stream: BinaryIO) -> Iterator[tuple[Any, Sizes]]:
    """Yields batches of rows, and the bytes of each row's values. Raises RowFault."""
    from pyarrow import parquet

    metadata = parquet.read_metadata(stream)
    if metadata.num_rows > MAX_PARQUET_ROWS:
        message = f"the file has {metadata.num_rows:,} rows, the limit is {MAX_PARQUET_ROWS:,}"
        raise RowFault("D106", message, "Divide it into several files.")
    columns = [metadata.schema.column(place) for place in range(metadata.num_columns)]
    texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
    table = parquet.ParquetFile(stream, metadata=metadata, read_dictionary=texts)
    check_columns(table.schema_arrow.names)
    for group in range(metadata.num_row_groups):
        _check_group(metadata.row_group(group), group + 1)
        for batch in table.iter_batches(batch_size=BATCH_ROWS, row_groups=[group]):
            zeros = np.zeros(batch.num_rows, np.int64)
            yield _times_as_numbers(batch), sum(map(_value_bytes, batch.columns), zeros)


def _check_group(group: Any, number: int) -> None:
    """Raises RowFault for a row group that no memory may hold."""
    columns = [group.column(place) for place in range(group.num_columns)]
    values = sum(max(column.num_values - group.num_rows, 0) for column in columns)
    if values > MAX_GROUP_VALUES:
        message = f"lists of row group {number} hold {values:,} more values than rows"
        raise RowFault("D106", f"{message}, the limit is {MAX_GROUP_VALUES:,}", SMALLER_GROUPS)
    packed = sum(column.total_compressed_size for column in columns)
    unpacked = sum(column.total_uncompressed_size for column in columns)
    if unpacked > max(MAX_UNPACKED_RATIO * packed, MIN_UNPACKED_BYTES):
        message = f"row group {number} unpacks {packed:,} bytes to {unpacked:,} bytes"
        raise RowFault("D106", message, SMALLER_GROUPS)


def _value_bytes(array: Any) -> Sizes:
    """Returns the bytes that each value of a column takes when nothing is shared."""
    import pyarrow
    from pyarrow import compute, types

    kind = array.type
    if types.is_dictionary(kind):
        sizes = np.append(_value_bytes(array.dictionary), 0)
        return sizes[array.indices.fill_null(len(sizes) - 1).to_numpy(zero_copy_only=False)]
    if types.is_struct(kind):
        return sum(map(_value_bytes, array.flatten()), np.zeros(len(array), np.int64))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        offsets = array.offsets.to_numpy()
        return np.diff(np.append(0, np.cumsum(_value_bytes(array.values)))[offsets]) + VALUE_BYTES
    if types.is_fixed_size_list(kind):
        lists = _value_bytes(array.values).reshape(-1, kind.list_size).sum(1)
        return lists[array.offset : array.offset + len(array)]
    if kind in (pyarrow.string(), pyarrow.binary(), pyarrow.large_string(), pyarrow.large_binary()):
        lengths = compute.binary_length(array).fill_null(0)
        return np.asarray(lengths.to_numpy(zero_copy_only=False)).astype(np.int64) + VALUE_BYTES
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _value_bytes(array.storage)
    width = 0 if types.is_null(kind) else kind.bit_width // 8  # ValueError: the size is unknown
    return np.full(len(array), VALUE_BYTES + width, np.int64)


def _times_as_numbers(batch: Any) -> Any:
    """Converts times to numbers: Python's times cover neither every nanosecond nor every year."""
    from pyarrow import RecordBatch, int32, int64, types

    columns = [
        (
            column.view(int32() if column.type.bit_width == 32 else int64())
            if types.is_temporal(column.type) and column.type.bit_width in (32, 64)
            else column
        )
        for column in batch.columns
    ]
    return RecordBatch.from_arrays(columns, names=batch.schema.names)


def _without_nulls(value: Any) -> Any:
    """Removes nulls: Parquet fills every struct up to the union of all rows' keys."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
