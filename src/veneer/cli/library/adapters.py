"""Keep adapters in a library: a folder with names, versions and tags.

For instance:

  veneer adapters add runs/tickets --name tickets --tag best
  veneer adapters ls --base "*smollm*"
  veneer generate --adapter tickets@1 "Where is my parcel?"

NAME is the newest version of a name; NAME@2 and NAME@tag are others.
"""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from veneer.bounds import COUNT
from veneer.cli.bases import add_dtype, load_plain_base, resolve_weight_format, storage_dtype
from veneer.cli.common import (
    adapters_command,
    add_action,
    add_card,
    add_json,
    add_library,
    make_console,
    print_json,
    working,
)
from veneer.cli.early import check_files
from veneer.cli.flags import add_repeated, add_switch, add_value
from veneer.errors import ConfigError
from veneer.wording import shown, shown_line, size

if TYPE_CHECKING:
    from veneer.library.entry import Entry
    from veneer.library.library import Library
    from veneer.models.frozen_base import FrozenBase
    from veneer.quant.config import Quantize

PLACES = "a folder, hf://org/name, or a URL such as s3://bucket/folder; https:// is read-only"

Run = Callable[[Namespace, "Library"], int]


def add_arguments(parser: ArgumentParser) -> None:
    from veneer.cli.library.adapters_ls import add_ls
    from veneer.cli.library.adapters_show import add_diff, add_show

    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, title="actions")

    def action(name: str, run: Run, help: str) -> ArgumentParser:
        action_parser = add_action(actions, name, help)
        action_parser.set_defaults(act=run)
        add_library(action_parser)
        add_json(action_parser)
        return action_parser

    add_ls(action)
    add_show(action)
    add = action("add", _add, "add an adapter folder, or the result of a run, to the library")
    add_value(add, "source", "FOLDER", "folder of an adapter or a run")
    add_value(add, "--name", "NAME", "name in the library; default: the folder's name")
    add_repeated(add, "--tag", "TAG", "tag of the new version; may be repeated")
    add_value(add, "--note", "TEXT", "note of one line", default="")
    _add_base(
        add, "for an adapter from elsewhere: check that it fits this base, and bind it to this base"
    )
    rm = action("rm", _rm, "remove a version, or all versions of a name; gc frees the space")
    add_value(rm, "adapter", "NAME[@V]")
    tag = action("tag", _tag, "change the tags or the note of a version")
    add_value(tag, "adapter", "NAME[@V]")
    add_value(
        tag, "tags", "TAG", "tags to set; a tag moves here from the version that had it", nargs="*"
    )
    add_repeated(tag, "--remove", "TAG", "tag to remove")
    add_value(tag, "--note", "TEXT", 'note of one line; "" removes it')
    rename = action("rename", _rename, "rename all versions of a name")
    add_value(rename, "old", "OLD")
    add_value(rename, "new", "NEW")
    add_diff(action)
    verify = action("verify", _verify, "check hashes, shapes and values of one adapter or all")
    add_value(verify, "adapter", "NAME[@V]", "default: all versions of all names", nargs="?")
    _add_base(verify, "also check that it fits this base")
    push = action("push", _push, "copy a version to another place and verify it there")
    add_value(push, "adapter", "NAME[@V]")
    add_value(push, "to", "PLACE", PLACES)
    add_card(push)
    pull = action("pull", _pull, "download a version and verify it; resumes if interrupted")
    add_value(pull, "place", "PLACE", PLACES)
    add_value(pull, "adapter", "NAME[@V]", "its name there; not for hf://", nargs="?")
    add_value(pull, "--name", "NAME", "its name here; default: its name there")
    gc = action("gc", _gc, "show unused files; with --yes, delete them")
    add_value(
        gc, "--keep", "N", "newest versions of a name to keep; default: 1", type=COUNT, default=1
    )
    add_switch(gc, "--yes", "delete them")


def run(args: Namespace) -> int:
    from veneer.library.library import Library

    code: int = args.act(args, Library(args.library))
    return code


def _add_base(parser: ArgumentParser, help: str) -> None:
    add_value(parser, "--base", "B", help)
    add_dtype(parser)


def _add(args: Namespace, library: Library) -> int:
    from veneer.library.names import is_reference

    name = args.name
    if name is None:
        path = Path(args.source).resolve()
        name = path.parent.name if path.name == "adapter" else path.name
        if not is_reference(name) or "@" in name:
            raise ConfigError(
                f"{name!r} is not a valid adapter name", [], "Give another: --name NAME."
            )
    base = load_plain_base(args)
    with working(f"adding {shown(args.source)}"):
        entry = library.add(args.source, name=name, tags=args.tag, note=args.note, base=base)
    return _print_added(entry, library, args, source=args.source)


def _print_added(entry: Entry, library: Library, args: Namespace, *, source: str | Path) -> int:
    if args.json:
        print_json(entry.to_dict())
        return 0
    facts = entry.version.facts
    console = make_console()
    console.print(f"{entry.reference} · {facts.method} · {size(facts.bytes)} · {library.folder}")
    if facts.base_proof == "unverified":
        base_note = f"Its files name the base {shown_line(facts.base)!r}." if facts.base else ""
        console.print(
            "  base: unverified, since the files hold no fingerprint of its weights. " + base_note
        )
        again = adapters_command(args, "add", source, "--name", entry.name, "--base", "B")
        console.print(f"  To check that it fits: {again}")
    elif facts.base_proof == "stated":
        console.print(
            f"  base: {shown_line(facts.base)}, as given with --base: names and shapes fit."
            " The adapter now loads only on these weights."
        )
    return 0


def _push(args: Namespace, library: Library) -> int:
    from veneer.library.remote.transfer import push

    check_files([args.figures])

    def card(entry: Entry, folder: Path) -> str | None:
        from veneer.merge.export.serving import commands
        from veneer.report.card import card_for, figures_in

        base, repository = (
            entry.version.facts.base or "",
            args.to.removeprefix("hf://").partition("@")[0],
        )
        run = [
            f"veneer adapters pull {shlex.quote(args.to)} --name {entry.name}",
            f"veneer chat --adapter {entry.name}",
            *commands("peft", base=base, out=repository),
        ]
        return card_for(
            folder,
            name=repository,
            commands=run,
            base=base,
            figures=figures_in(args.figures),
            sample=args.sample,
        )

    with working(f"pushing {args.adapter}"):
        result = push(library, args.adapter, args.to, card)
    if args.json:
        print_json(
            {
                "reference": result.reference,
                "address": result.address,
                "bytes": result.bytes,
                "skipped": result.skipped,
            }
        )
    else:
        outcome = "already there" if result.skipped else size(result.bytes)
        make_console().print(f"{shown(result.reference)} · {outcome} · {shown(result.address)}")
    return 0


def _pull(args: Namespace, library: Library) -> int:
    from veneer.library.remote.transfer import pull

    with working(f"pulling from {args.place}"):
        entry = pull(library, args.place, args.adapter, name=args.name)
    source = (library.objects / entry.version.object).absolute()
    return _print_added(entry, library, args, source=source)


def _rm(args: Namespace, library: Library) -> int:
    removed = library.remove(args.adapter)
    if args.json:
        print_json([entry.to_dict() for entry in removed])
        return 0
    console = make_console()
    console.print(f"removed {', '.join(entry.reference for entry in removed)}")
    console.print(f"  to see which files are unused: {adapters_command(args, 'gc')}")
    newest = removed[-1]
    source = (library.objects / newest.version.object).absolute()
    tags = [f"--tag={tag}" for tag in newest.version.tags]
    note = [f"--note={newest.version.note}"] if newest.version.note else []
    again = adapters_command(args, "add", source, "--name", newest.name, *tags, *note)
    console.print(f"  to add {newest.reference} again as the next version: {again}")
    return 0


def _tag(args: Namespace, library: Library) -> int:
    if not args.tags and not args.remove and args.note is None:
        raise ConfigError("nothing to change", [], "Give tags, --remove TAG or --note TEXT.")
    entry = library.change(args.adapter, tag=args.tags, untag=args.remove, note=args.note)
    if args.json:
        print_json(entry.to_dict())
    else:
        tags = ", ".join(entry.version.tags) or "no tags"
        note = f" · {shown(entry.version.note)}" if entry.version.note else ""
        make_console().print(f"{entry.reference} · {tags}{note}")
    return 0


def _rename(args: Namespace, library: Library) -> int:
    library.rename(args.old, args.new)
    if args.json:
        print_json({"old": args.old, "new": args.new})
    else:
        make_console().print(f"{args.old} is now {args.new}")
    return 0


def _verify(args: Namespace, library: Library) -> int:
    faults_by_reference = library.verify(
        args.adapter, base=_load_bases_as_trained(args) if args.base else None
    )
    faulty = {reference: faults for reference, faults in faults_by_reference.items() if faults}
    if args.json:
        print_json({"checked": len(faults_by_reference), "faults": faults_by_reference})
    else:
        console = make_console()
        for reference, faults in faulty.items():
            console.print(f"{reference}: faulty", style="bold red")
            for fault in faults:
                console.print(f"  {shown(fault)}")
        checks = "hashes, shapes and values" + (" and the fit on the base" if args.base else "")
        console.print(f"{len(faults_by_reference):,} checked, {len(faulty):,} faulty: {checks}")
    return 4 if faulty else 0


def _load_bases_as_trained(args: Namespace) -> Callable[[Path], FrozenBase]:
    """Returns a function that loads --base in the format that an adapter was trained over.

    It keeps the last base for the next adapter.
    """
    from functools import lru_cache

    from veneer.models.load import load_base

    @lru_cache(maxsize=1)
    def loaded(quantize: Quantize | None, keep_dense: tuple[str, ...]) -> FrozenBase:
        return load_base(
            args.base,
            dtype=storage_dtype(args.dtype),
            device="cpu",
            quantize=quantize,
            keep_dense=keep_dense,
        )

    def base_of(folder: Path) -> FrozenBase:
        quantize, keep_dense = resolve_weight_format(None, folder, force_base=False)
        return loaded(quantize, tuple(keep_dense))

    return base_of


def _gc(args: Namespace, library: Library) -> int:
    unused = library.collect(keep=args.keep, apply=args.yes)
    if args.json:
        fields: dict[str, Any] = {
            "versions": unused.versions,
            "objects": unused.objects,
            "remains": unused.remains,
        }
        print_json({**fields, "bytes": unused.bytes, "removed": args.yes})
        return 0
    console = make_console()
    for reference in unused.versions[:20]:
        console.print(f"  {reference}: an old version without a tag")
    if len(unused.versions) > 20:
        console.print(f"  and {len(unused.versions) - 20:,} more old versions")
    objects = f"{len(unused.objects):,} object{'' if len(unused.objects) == 1 else 's'}"
    counts = f"{objects}, {len(unused.remains):,} unfinished files, {size(unused.bytes)}"
    console.print(f"{'removed' if args.yes else 'unused'}: {counts}")
    if not args.yes and (unused.versions or unused.objects or unused.remains):
        delete = adapters_command(args, "gc", "--keep", args.keep, "--yes")
        console.print(f"To keep a version, tag it. To delete them: {delete}")
    return 0
