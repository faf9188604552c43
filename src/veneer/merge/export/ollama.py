"""A Modelfile for Ollama: where the model is, its chat template in Go's text/template, its system
turn, what stops it.

Ollama joins messages of one role that follow each other, hands all of them to the template, and
puts the token in front that the .gguf file asks for: that token is left out here. It puts SYSTEM in
front of conversations without a system turn, as our own commands do with an adapter's. Source:
ollama, parser/parser.go, template/template.go, server/prompt.go.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from veneer.adapters.preamble import Preamble
from veneer.data.template.template import ChatTemplate
from veneer.errors import RefusedError
from veneer.merge.export.turns import INSTEAD, TurnTemplate, turns_of
from veneer.wording import shown

MOST_CONTEXT = 8192
"""Tokens of a conversation that Ollama is asked to keep; it cuts longer ones in silence, and memory
grows with it."""


def modelfile(
    tokenizer: PreTrainedTokenizerBase,
    preamble: Preamble,
    *,
    model: str,
    stops: Sequence[int],
    positions: int | None,
    made_of: str,
) -> tuple[str, list[str]]:
    """(its text, what the user must know).

    model      name of the .gguf file beside it
    stops      ids of the tokens that end an answer
    positions  that the model has; None: not known
    made_of    what stands in its first line
    RefusedError: the template cannot be said in Ollama's language, or the system turn or what stops
        not in a Modelfile.
    """
    template = ChatTemplate(tokenizer, variables=preamble.variables)
    turns, notes = turns_of(template)
    lines = [f"# {' '.join(shown(made_of).split())}", f"FROM ./{model}"]
    lines.append(f'TEMPLATE """{go_template(_without_begin(turns, tokenizer))}"""')
    if preamble.system is not None:
        if "system" not in turns.around:
            raise RefusedError(
                "the adapter has a system turn, and the base's template takes none", [], INSTEAD
            )
        lines.append(f'SYSTEM """{_plain(preamble.system)}"""')
    lines += [f'PARAMETER stop "{text}"' for text in _ends(tokenizer, stops)]
    lines.append(f"PARAMETER num_ctx {min(positions or MOST_CONTEXT, MOST_CONTEXT)}")
    lines.append("PARAMETER temperature 0")
    return "\n".join(lines) + "\n", notes


def go_template(turns: TurnTemplate) -> str:
    """The turns in Go's text/template, as Ollama gives it .Messages.

    A user is second only behind a system turn, as users and assistants take turns.
    """
    text = "{{ range $i, $_ := .Messages }}"
    if turns.bare:
        text += f'{{{{ if and (eq $i 0) (ne .Role "system") }}}}{_words(turns.bare)}{{{{ end }}}}'
    branch = "if"
    for role, (before, behind) in turns.around.items():
        begins = _words(before)
        if turns.folds and role == "user":
            begins = f"{{{{ if ne $i 1 }}}}{begins}{{{{ end }}}}"
        text += f'{{{{ {branch} eq .Role "{role}" }}}}{begins}{{{{ .Content }}}}{_words(behind)}'
        branch = "else if"
    return text + "{{ end }}{{ end }}" + _words(turns.opens)


def _words(text: str) -> str:
    """Text as it stands in a template; quoted where it would be read as an action, or as the
    Modelfile's end."""
    plain = "{{" not in text and not text.endswith("{") and '"""' not in text and not unkept(text)
    return text if plain else f'{{{{ "{"".join(map(_quoted, text))}" }}}}'


def _quoted(character: str) -> str:
    """In a Go string."""
    kept = character.isascii() and character.isprintable() and character not in '"\\{'
    return character if kept else f"\\U{ord(character):08x}"


def unkept(text: str) -> list[str]:
    """Characters that Ollama's reader of Modelfiles drops: what is not printable, but for spaces
    and ends of lines."""
    return sorted({c for c in text if not c.isprintable() and c not in "\n\r\t"})


def _plain(text: str) -> str:
    faults = [f"U+{ord(character):04X} is dropped" for character in unkept(text)]
    faults += ["three quotation marks end it"] if '"""' in text else []
    if faults:
        raise RefusedError("the adapter's system turn cannot stand in a Modelfile", faults, INSTEAD)
    return text


def _ends(tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]) -> list[str]:
    """Texts of these tokens. RefusedError: one would end its line, which others then go on from."""
    texts = [str(tokenizer.decode([number])) for number in stops]
    if faults := [
        shown(repr(text)) for text in texts if re.search(r'["\r\n]', text) or unkept(text)
    ]:
        raise RefusedError("a token that ends answers cannot stand in a Modelfile", faults, INSTEAD)
    return [text for text in texts if text]


def _without_begin(turns: TurnTemplate, tokenizer: PreTrainedTokenizerBase) -> TurnTemplate:
    """The turns without the token that the .gguf file has put in front. RefusedError: it is not
    written there."""
    begin, ids = tokenizer.bos_token, tokenizer("a")["input_ids"]
    if begin is None or not ids or ids[0] != tokenizer.bos_token_id:
        return turns
    before, behind = turns.around.get("system", (begin, ""))
    if not (turns.bare.startswith(begin) and before.startswith(begin)):
        raise RefusedError(
            "the .gguf file puts a begin token in front that the base's template does not write"
        )
    around = {
        role: (before.removeprefix(begin), behind) if role == "system" else a
        for role, a in turns.around.items()
    }
    return replace(turns, around=around, bare=turns.bare.removeprefix(begin))
