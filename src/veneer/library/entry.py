"""An adapter's name with one of its versions: choosing and filtering them."""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from veneer.errors import ConfigError
from veneer.library.names import Reference
from veneer.library.records import Record, Version


@dataclass(frozen=True)
class Entry:
    """Pairs a name with one of its versions."""

    name: str
    version: Version

    @property
    def reference(self) -> str:
        return f"{self.name}@{self.version.version}"

    def to_dict(self) -> dict[str, Any]:
        fields = self.version.model_dump(mode="json")
        facts = fields.pop("facts")
        return {"name": self.name, "reference": self.reference, **fields, **facts}


SortKey = Literal["name", "added", "size", "method", "base"]


def passes(version: Version, base: str | None, method: str | None, tag: str | None) -> bool:
    """Returns whether a version passes the filters of `Library.entries`."""
    facts = version.facts
    if base is not None:
        name = facts.base or ""
        base_names = [name, name.rpartition("/")[2], (facts.base_digest or "")[: max(len(base), 8)]]
        if not any(fnmatchcase(base_name, base) for base_name in base_names):
            return False
    return (method is None or facts.method == method) and (tag is None or tag in version.tags)


def chosen_version(wanted: Reference, record: Record) -> Version:
    """Returns the version that a reference means. ConfigError lists the versions there are."""
    if wanted.version is None and wanted.tag is None:
        return record.newest
    for version in record.versions:
        if version.version == wanted.version or (
            wanted.tag is not None and wanted.tag in version.tags
        ):
            return version
    versions = ", ".join(
        f"@{v.version}" + "".join(f" ({tag})" for tag in v.tags) for v in record.versions
    )
    raise ConfigError(f"there is no {wanted}", [], f"{wanted.name} has {versions}.")
