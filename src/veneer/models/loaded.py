"""What transformers says about a load, as an error that names every weight that is not what it should be."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from veneer.errors import CorruptFileError

NEXT_DOWNLOAD = "Download the model again; if it stays, ask its author."


def check_loaded(
    folder: Path, model: PreTrainedModel, info: Mapping[str, Any], others: Sequence[str] = ()
) -> None:
    """Raises CorruptFileError if a weight is missing, misshapen or left over, or for `others`, faults found before."""
    faults = [f"missing    {name}" for name in sorted(info["missing_keys"])]
    faults += [
        f"misshapen  {name}: {tuple(stored)} in the file, {tuple(built)} in the model"
        for name, stored, built in sorted(info["mismatched_keys"])
    ]
    faults += [f"error      {message}" for message in info.get("error_msgs", [])]
    faults += others
    # Old buffers and parts of other models may lie in a file; a layer that config.json leaves out may not.
    known = {_without_numbers(name) for name in model.state_dict()}
    faults += [
        f"left over  {name}: config.json builds fewer of these"
        for name in sorted(info["unexpected_keys"])
        if _without_numbers(name) in known
    ]
    if faults:
        raise CorruptFileError(
            f"the weights in {folder} are not those of a {type(model).__name__} as config.json describes it",
            faults[:20] + ([f"and {len(faults) - 20} more"] if len(faults) > 20 else []),
            NEXT_DOWNLOAD,
        )


def _without_numbers(name: str) -> str:
    return re.sub(r"\.\d+\.", ".N.", name)
