"""Is this the base that an adapter was trained on, and does it read text as then? Both sides of
every difference.

An adapter without veneer.json says neither: then there is nothing to compare.
"""

from veneer.bases.identity.fingerprint import Fingerprint
from veneer.formats.manifest import Manifest
from veneer.models.frozen_base import FrozenBase


def other_base(manifest: Manifest | None, base: FrozenBase) -> list[str]:
    """What differs between the base it was trained on and this one, the adapter's side first."""
    if manifest is None:
        return []
    trained_on = manifest.base
    theirs, ours = Fingerprint.from_dict(trained_on.fingerprint), base.fingerprint()
    if base.is_named_by(theirs):
        return []
    named = trained_on.name + (f" at {trained_on.revision}" if trained_on.revision else "")
    here = base.name_or_path + (f" at {base.revision}" if base.revision else "")
    names = [f"base: {named} against {here}"] if named != here else []
    return names + theirs.differences(ours)


def other_text(manifest: Manifest | None, base: FrozenBase) -> list[str]:
    """What of its text differs: other token ids, or another layout of a conversation, mean another
    input."""
    if manifest is None:
        return []
    pairs = [
        ("tokenizer", manifest.tokenizer_hash, base.tokenizer_hash()),
        ("chat template", manifest.template_hash, base.template_hash()),
    ]
    return [
        f"{what}: sha256 {trained[:12]}… against {'none' if here is None else here[:12] + '…'}"
        for what, trained, here in pairs
        if trained is not None and trained != here
    ]


def which_base(manifest: Manifest | None, name: str | None, base: FrozenBase) -> str:
    """What to do where the base is another one. name: of the base that the adapter was trained
    on."""
    assert manifest is not None
    held = Fingerprint.from_dict(manifest.base.fingerprint).quantize
    otherwise = "or, if you know better, use --force-base."
    if held == base.fingerprint().quantize:
        return f"Load the base it was trained on ({name}), {otherwise}"
    if held is None:
        return f"It was trained over dense weights: load the base without --quantize, {otherwise}"
    return (
        f"It was trained over weights held as {held}: load the base with --quantize {held},"
        f" {otherwise}"
    )
