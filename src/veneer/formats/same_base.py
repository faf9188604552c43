"""Compares a base with the one an adapter was trained on, and how both read text.

Each difference shows both sides. An adapter without veneer.json has nothing to compare.
"""

from veneer.bases.identity.fingerprint import Fingerprint
from veneer.formats.manifest import Manifest
from veneer.models.frozen_base import FrozenBase


def base_differences(manifest: Manifest | None, base: FrozenBase) -> list[str]:
    """Describes the differences between the adapter's base and this one, the adapter's side
    first."""
    if manifest is None:
        return []
    trained_on = manifest.base
    theirs, ours = Fingerprint.from_dict(trained_on.fingerprint), base.fingerprint()
    if base.is_named_by(theirs):
        return []
    trained_name = trained_on.name + (f" at {trained_on.revision}" if trained_on.revision else "")
    loaded_name = base.name_or_path + (f" at {base.revision}" if base.revision else "")
    names = [f"base: {trained_name} against {loaded_name}"] if trained_name != loaded_name else []
    return names + theirs.differences(ours)


def text_differences(manifest: Manifest | None, base: FrozenBase) -> list[str]:
    """Describes differences in tokenizer and chat template: either changes the model's input."""
    if manifest is None:
        return []
    pairs = [
        ("tokenizer", manifest.tokenizer_hash, base.tokenizer_hash()),
        ("chat template", manifest.template_hash, base.template_hash()),
    ]
    return [
        f"{part}: sha256 {trained[:12]}… against"
        f" {'none' if current is None else current[:12] + '…'}"
        for part, trained, current in pairs
        if trained is not None and trained != current
    ]


def wrong_base_remedy(manifest: Manifest | None, name: str | None, base: FrozenBase) -> str:
    """Says what to do about a different base. name: the base that the adapter was trained on"""
    assert manifest is not None
    trained_format = Fingerprint.from_dict(manifest.base.fingerprint).quantize
    alternative = "or use --force-base if you are sure."
    if trained_format == base.fingerprint().quantize:
        return f"Load the base it was trained on ({name}), {alternative}"
    if trained_format is None:
        return f"It was trained over dense weights: load the base without --quantize, {alternative}"
    return (
        f"It was trained over {trained_format} weights: load the base with --quantize"
        f" {trained_format},"
        f" {alternative}"
    )
