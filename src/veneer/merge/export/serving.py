"""Commands that serve what was exported for another program."""

import json
import re
import shlex
from pathlib import Path

from veneer.bases.names.named import NAMED
from veneer.bases.names.sources import gguf_file
from veneer.merge.programs import Program

_PEFT = (
    "from peft import PeftModel; from transformers import AutoModelForCausalLM; "
    "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), {out})"
)
_TRANSFORMERS = (
    "from transformers import AutoModelForCausalLM;"
    " AutoModelForCausalLM.from_pretrained({base}).load_adapter({out})"
)


def commands(to: Program, *, base: str, out: str | Path, rank: int | None = None) -> list[str]:
    """Returns commands for an adapter beside its base. rank: option for vLLM; None: its default."""
    base, out = public_name(base), str(out)
    name = shlex.quote(Path(out).stem or "adapter")
    if to == "vllm":
        rank_option = f" --max-lora-rank {rank}" if rank else ""
        return [
            f"vllm serve {shlex.quote(base)} --enable-lora{rank_option} --lora-modules"
            f" {name}={shlex.quote(out)}"
        ]
    if to == "llamacpp":
        if gguf_file(base) is not None:
            return [f"llama-server -m {shlex.quote(base)} --lora {shlex.quote(out)} --jinja"]
        remote = "" if Path(base).exists() else "--remote "
        return [
            f"python convert_hf_to_gguf.py {remote}{shlex.quote(base)} --outfile base.gguf",
            f"llama-server -m base.gguf --lora {shlex.quote(out)} --jinja",
        ]
    code = (_TRANSFORMERS if to == "transformers" else _PEFT).format(
        base=json.dumps(base), out=json.dumps(out)
    )
    return [f"python -c {shlex.quote(code)}"]


def whole_model_commands(to: Program, out: str | Path) -> list[str]:
    """Returns commands for a merged model."""
    out = Path(out)
    if to == "ollama":
        name = re.sub(r"[^a-z0-9._-]+", "-", out.name.lower()).strip("-._") or "model"
        return [
            f"ollama create {name} -f {shlex.quote(str(out / 'Modelfile'))}",
            f"ollama run {name}",
        ]
    return [f"llama-server -m {shlex.quote(str(out))} --jinja"]


def public_name(base: str) -> str:
    """Returns a base's name for other programs."""
    return NAMED[base].hub_id if base in NAMED else base
