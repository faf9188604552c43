"""Decodes the text of row files. Bytes that are not UTF-8 are a fault of their row."""

import codecs

from veneer.data.examples import RowFault

UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""What a file of UTF-16 begins with."""


def utf8(line: bytes) -> str:
    """Decodes a line. Raises RowFault."""
    if b"\0" in line:
        raise RowFault("D102", "holds NUL bytes: the file is damaged, or not text")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise RowFault(
            "D102",
            "is not UTF-8",
            "Save the file as UTF-8. If it is Windows text: iconv -f CP1252 -t UTF-8 OLD > NEW",
            f"byte 0x{line[error.start]:02X} at {error.start + 1}",
        ) from None
