"""Bases that a run may train on: the server's, and others on this machine, by name.

Only the server's base answers here. For another, the tokenizer and the config are read, and the
trainer's process loads its weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from veneer.bases.on_this_machine import LocalBase, local_base, local_bases
from veneer.bases.tokenizer import load_tokenizer
from veneer.data.examples import Capacity
from veneer.models.capacity import capacity_of, configured_capacity
from veneer.models.frozen_base import FrozenBase
from veneer.serve.refusals import Refusal

OWN = ""
"""Name of the server's base here."""


class StudioBases:
    """Finds bases by name. run: settings of a run on the server's base. folders: of more bases.
    name: of the server's base in its answers"""

    def __init__(
        self, base: FrozenBase, name: str, run: Mapping[str, Any], folders: Sequence[Path]
    ) -> None:
        self.name, self._run, self._folders = name, run, folders
        self._source = str(run.get("base", base.source))
        self._own_names = {name, base.source, base.name_or_path, self._source}
        # Tokenizers change while they encode, so this one is a copy that nothing else uses.
        self._own = (copy.deepcopy(base.tokenizer), capacity_of(base))
        self._last: tuple[str, tuple[Any, Capacity]] | None = None

    def listed(self) -> list[dict[str, Any]]:
        """Lists the other bases: their names, folders, and the bytes of their weights."""
        return [
            {"name": base.name, "title": base.title, "folder": base.folder, "bytes": base.bytes}
            for base in local_bases(self._folders)
            if not self._is_own(base)
        ]

    def _is_own(self, base: LocalBase) -> bool:
        return base.name in self._own_names or base.source in self._own_names

    def source(self, name: str) -> str:
        """Returns what --base takes. Refusal: 404, it is not on this machine."""
        if name == OWN:
            return self._source
        base = local_base(name, self._folders)
        if base is None or self._is_own(base):
            raise Refusal(404, f"The base `{name[:80]}` is not on this machine.", "base")
        return base.source

    def run_settings(self, name: str) -> dict[str, Any]:
        """Returns the settings of every run on a base. Only the server's base has the server's
        format of weights."""
        if name == OWN:
            return dict(self._run)
        settings = {key: value for key, value in self._run.items() if key != "quantize"}
        return {**settings, "base": self.source(name)}

    def reader(self, source: str) -> tuple[Any, Capacity]:
        """Returns the tokenizer and the capacity of a base. Call it in one thread only."""
        if self.serves(source):
            return self._own
        if self._last is None or self._last[0] != source:
            tokenizer, config = load_tokenizer(source)
            self._last = (source, (tokenizer, configured_capacity(config)))
        return self._last[1]

    def serves(self, source: str) -> bool:
        """Whether this is the server's base, so that adapters of it answer here."""
        return source in self._own_names

    def describe(self, source: str, name: str) -> dict[str, Any]:
        """Describes the base of a job. name: by which it was chosen

        `command` serves it. A path is not shown: its last part stands for it.
        """
        if self.serves(source):
            return {"name": self.name, "served": True, "command": _command(self.name)}
        title = PurePath(name).name if Path(source).is_absolute() else name
        return {"name": title, "served": False, "command": _command(name)}


def _command(name: str) -> str:
    return f"veneer studio --base {name}"
