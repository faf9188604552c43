"""What mkdocs.yml cannot say: pages written from the code, links out of the folder, and nothing
from other places."""

import argparse
import re
from typing import Any

OTHERS = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//""")


def on_config(config: Any) -> Any:
    """Headings are named as GitHub names them, so that links between pages lead somewhere on
    both."""
    from pymdownx.slugs import slugify

    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A comment `<!-- commands -->` or `<!-- settings -->` becomes what the code says."""
    for name, write in (("commands", commands), ("settings", settings)):
        if (mark := f"<!-- {name} -->") in markdown:
            markdown = markdown.replace(mark, write())
    return markdown


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Nothing on a page may be fetched from anybody else."""
    if found := OTHERS.search(output):
        raise ValueError(
            f"{page.file.src_uri} would fetch from elsewhere:"
            f" {output[found.start() : found.end() + 60]}"
        )
    return output


def commands() -> str:
    """Every command with its words and flags."""
    from veneer.cli.main import COMMANDS, Parser, command_module

    parts = []
    for name, summary in COMMANDS.items():
        module = command_module(name)
        parser = Parser(prog=f"veneer {name}", allow_abbrev=False)
        module.add_arguments(parser)
        parts.append(f"## veneer {name}\n\n{summary[0].upper()}{summary[1:]}.\n")
        if examples := re.findall(
            r"^  (veneer .*(?:\\\n.*)*)$", module.__doc__ or "", re.MULTILINE
        ):
            parts.append("```\n" + "\n".join(examples) + "\n```\n")
        parts.append(_flags(parser, 3))
    return "\n".join(parts)


def _flags(parser: argparse.ArgumentParser, level: int) -> str:
    """A table of a parser's flags; below it those of its own commands."""
    rows, below = [], []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {each.dest: each.help or "" for each in action._choices_actions}
            for name, inner in action.choices.items():
                heading = f"{'#' * level} {inner.prog}\n\n{helps.get(name, '')}\n"
                below.append(heading + "\n" + _flags(inner, level + 1))
        elif action.help != argparse.SUPPRESS and "--help" not in action.option_strings:
            rows.append(f"| {_called(action)} | {_cell(_said(action))} |")
    table = ["| flag | |", "|---|---|", *rows, ""] if rows else []
    return "\n".join([*table, *below])


def _called(action: argparse.Action) -> str:
    value = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if action.choices:
        value = ",".join(map(str, action.choices))
    names = ", ".join(action.option_strings)
    if not names:
        return f"`{value}`"
    return f"`{names}`" if action.nargs == 0 else f"`{names} {value}`"


def _said(action: argparse.Action) -> str:
    return (action.help or "").replace("%%", "%")


def _cell(text: str) -> str:
    """As one cell of a table; what stands in backticks stays as it is."""
    parts = " ".join(text.split()).replace("|", "\\|").split("`")
    plain = [
        each.replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_") for each in parts[::2]
    ]
    return "`".join(
        each for pair in zip(plain, [*parts[1::2], ""], strict=True) for each in pair
    ).removesuffix("`")


def settings() -> str:
    """Every setting of a run file with its default, its bounds' type and its sentence; those of
    methods and objectives by name."""
    from veneer.adapters.config import METHODS
    from veneer.data.config import DataConfig
    from veneer.files.settings import description_at
    from veneer.objectives.config import OBJECTIVES
    from veneer.training.config import ReplayConfig, RunConfig, TemplateConfig

    def table(model: Any, names: Any, before: str = "") -> str:
        head = ["| setting | default | |", "|---|---|---|"]
        rows = []
        for name in names:
            field = model.model_fields[name]
            default = (
                "needed"
                if field.is_required()
                else f"`{_default(field.get_default(call_default_factory=True))}`"
            )
            rows.append(
                f"| `{before}{name}` | {default} | {_cell(description_at(model, (name,)))} |"
            )
        return "\n".join([*head, *rows, ""])

    parts = [table(RunConfig, RunConfig.model_fields)]
    parts += ["### data\n", table(DataConfig, DataConfig.model_fields, "data.")]
    parts += ["### replay\n", table(ReplayConfig, ReplayConfig.model_fields, "replay.")]
    parts += ["### template\n", table(TemplateConfig, TemplateConfig.model_fields, "template.")]
    for name, model in METHODS.items():
        fields = [each for each in model.model_fields if each != "name"]
        parts.append(f"### method: {name}\n")
        parts.append(table(model, fields, "method.") if fields else "No settings of its own.\n")
    for name, objective in OBJECTIVES.items():
        fields = [each for each in objective.model_fields if each != "name"]
        parts.append(f"### objective: {name}\n")
        own = table(objective, fields, "objective.")
        parts.append(own if fields else "No settings of its own.\n")
    return "\n".join(parts)


def _default(value: Any) -> str:
    if hasattr(value, "name"):
        return str(value.name)
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )
