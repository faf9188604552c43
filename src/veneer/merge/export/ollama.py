"""A Modelfile for Ollama: the model, its chat template in Go's text/template, system turn, stop
texts.

Ollama joins consecutive messages of one role, passes all messages to the template, and adds the
begin token that the .gguf file asks for, so that token is left out here. It puts SYSTEM before
conversations without a system turn, as our own commands do with an adapter's. Source: ollama,
parser/parser.go, template/template.go, server/prompt.go.
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
"""Context length set for Ollama: it cuts longer conversations silently, and memory grows with
it.
"""


def modelfile(
    tokenizer: PreTrainedTokenizerBase,
    preamble: Preamble,
    *,
    model: str,
    stops: Sequence[int],
    positions: int | None,
    made_of: str,
) -> tuple[str, list[str]]:
    """Returns (the Modelfile's text, notes for the user).

    model      name of the .gguf file beside it
    stops      ids of the tokens that end an answer
    positions  of the model; None: unknown
    made_of    text of the first line

    RefusedError: the template cannot be expressed in Ollama's language, or the system turn or a
    stop text not in a Modelfile.
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
    """Returns the turns in Go's text/template, for Ollama's .Messages.

    A user's message is second only after a system turn, because users and assistants alternate.
    """
    text = "{{ range $i, $_ := .Messages }}"
    if turns.bare:
        text += f'{{{{ if and (eq $i 0) (ne .Role "system") }}}}{_words(turns.bare)}{{{{ end }}}}'
    branch = "if"
    for role, (prefix, suffix) in turns.around.items():
        start = _words(prefix)
        if turns.folds and role == "user":
            start = f"{{{{ if ne $i 1 }}}}{start}{{{{ end }}}}"
        text += f'{{{{ {branch} eq .Role "{role}" }}}}{start}{{{{ .Content }}}}{_words(suffix)}'
        branch = "else if"
    return text + "{{ end }}{{ end }}" + _words(turns.opens)


def _words(text: str) -> str:
    """Returns text for a template, quoted if it would be read as an action or as the Modelfile's
    end.
    """
    needs_no_quotes = (
        "{{" not in text and not text.endswith("{") and '"""' not in text and not unkept(text)
    )
    return text if needs_no_quotes else f'{{{{ "{"".join(map(_quoted, text))}" }}}}'


def _quoted(character: str) -> str:
    """Returns a character for a Go string."""
    is_plain = character.isascii() and character.isprintable() and character not in '"\\{'
    return character if is_plain else f"\\U{ord(character):08x}"


def unkept(text: str) -> list[str]:
    """Returns characters that Ollama's Modelfile reader drops: not printable, except spaces and
    line ends.
    """
    return sorted({c for c in text if not c.isprintable() and c not in "\n\r\t"})


def _plain(text: str) -> str:
    faults = [f"U+{ord(character):04X} is dropped" for character in unkept(text)]
    faults += ["three quotation marks end it"] if '"""' in text else []
    if faults:
        raise RefusedError(
            "the adapter's system turn cannot be written in a Modelfile", faults, INSTEAD
        )
    return text


def _ends(tokenizer: PreTrainedTokenizerBase, stops: Sequence[int]) -> list[str]:
    """Returns the texts of these tokens. RefusedError for text that would end its line in a
    Modelfile.
    """
    texts = [str(tokenizer.decode([number])) for number in stops]
    if faults := [
        shown(repr(text)) for text in texts if re.search(r'["\r\n]', text) or unkept(text)
    ]:
        raise RefusedError(
            "a token that ends answers cannot be written in a Modelfile", faults, INSTEAD
        )
    return [text for text in texts if text]


def _without_begin(turns: TurnTemplate, tokenizer: PreTrainedTokenizerBase) -> TurnTemplate:
    """Returns the turns without the begin token that the .gguf file adds, or raises
    RefusedError.
    """
    begin, ids = tokenizer.bos_token, tokenizer("a")["input_ids"]
    if begin is None or not ids or ids[0] != tokenizer.bos_token_id:
        return turns
    prefix, suffix = turns.around.get("system", (begin, ""))
    if not (turns.bare.startswith(begin) and prefix.startswith(begin)):
        raise RefusedError(
            "the .gguf file puts a begin token in front that the base's template does not write"
        )
    around = {
        role: (prefix.removeprefix(begin), suffix) if role == "system" else words
        for role, words in turns.around.items()
    }
    return replace(turns, around=around, bare=turns.bare.removeprefix(begin))
