"""Finds the flags of a command line that its command lacks, or that stand there too often."""

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile

from veneer.private import argparse as private
from veneer.vocabulary import NOT_NEEDED, KeyPath, nearest


def find_repeated_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """Lists the flags that take one value and are given several times."""
    flags = [word.partition("=")[0] for word in takewhile(lambda word: word != "--", words)]
    times = Counter(flag for flag in flags if private.takes_one_value(parser, flag))
    return [flag for flag, number in times.items() if number > 1]


def find_unknown_flags(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """Lists the flags that the parser does not have, each with a suggestion."""
    unknown = []
    for index, word in enumerate(words):
        flag, sign, value = word.partition("=")
        if word == "--":
            break
        if not re.fullmatch(r"--\w[\w-]*|-[a-zA-Z]", flag) or flag in private.flags_of(parser):
            continue
        following = words[index + 1 : index + 2]
        value = (
            value
            if sign
            else "".join(next_word for next_word in following if not next_word.startswith("-"))
        )
        key = flag.strip("-").replace("-", "_").lower()
        suggestion = _find_meant_flag(parser, key, value or "...")
        reason = NOT_NEEDED.get(key) if "--set" in private.flags_of(parser) else None
        hint = (
            f": did you mean {suggestion}?"
            if suggestion
            else f": remove it ({reason})"
            if reason
            else ""
        )
        unknown.append(flag + hint)
    return unknown


def _find_meant_flag(parser: argparse.ArgumentParser, key: str, value: str) -> str | None:
    """Suggests a flag, or the --set of a setting without a flag, for an unknown flag."""
    parser_flags = [flag for flag in private.flags_of(parser) if flag.startswith("--")]
    names: dict[KeyPath, str] = {(flag[2:].replace("-", "_"),): flag for flag in parser_flags}
    if "--set" in parser_flags:  # a command that takes settings, which has loaded them by now
        from veneer.cli.config_file import FLAGS, list_setting_paths

        flags = {path: "--" + name.replace("_", "-") for name, path in FLAGS.items()}
        for path in list_setting_paths():
            flag = flags.get(path)
            names.setdefault(
                path, flag if flag in parser_flags else f"--set {'.'.join(path)}={value}"
            )
    nearest_path = nearest((key,), names, value)
    return None if nearest_path is None else names[nearest_path]
