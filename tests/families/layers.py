"""Writes docs/layers.md: by which path the layers of each family are computed.

    python -m tests.families.layers       all families that docs/families.md compares (20 minutes)

A family is its small random model in bfloat16 with a LoRA adapter on every linear layer. Training
is asked of execution/train_step.py, decoding of execution/decode_step.py.
"""

from __future__ import annotations

import multiprocessing
import re
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path

import veneer
from tests.families.models import save_family
from tests.families.page import PAGE as FAMILIES
from tests.families.page import rows_of
from veneer.adapters.config import LoRA
from veneer.bases.quiet_transformers import quiet
from veneer.decoding.proof import prove_decoding
from veneer.errors import VeneerError
from veneer.execution.decode_step import forward_by_layers
from veneer.execution.train_parts import FusedAttention, FusedGate, FusedNorm
from veneer.execution.train_step import FusedLayer, replacements

PAGE = Path(__file__).parents[2] / "docs" / "layers.md"
WHOLE, HALF = "whole layers", "attention with norms in one node"
KINDS = {FusedAttention: "attention", FusedGate: "gates", FusedNorm: "norms"}
"""What kernels compute as one node of the graph, in the page's words."""
OWN = "the model's own code"
HEAD = f"""# Layers

Which code computes the layers of each family (see [families](families.md)): small random models in
bfloat16 with a LoRA adapter on every linear layer, on a processor with bf16 instructions. Written
by `python -m tests.families.layers` on {{date}}.

- **training**: what the kernels compute as one node of the graph. {OWN.capitalize()} computes the
  rest, with the adapters' products. *Whole layers* is the fastest path: one node computes a decoder
  layer. *Attention with norms in one node*: the node ends before the feed-forward block. The
  model's own module computes that block: experts, or an unknown activation.
- **decoding**: *layer by layer* means that Veneer calls the parts of each layer itself, over blocks
  of keys and values. Else the model's own forward runs, and the table says why.
"""
LAYERS = "layer by layer"
END = """
Families that would need more than a description of their layers to become faster:

- **BLOOM, MPT, Falcon with ALiBi**: scores of attention get a bias by distance (ALiBi), which the
  kernels do not add, and their code does not offer transformers' attention interface. So rows are
  padded.

- **GPT-J, CodeGen**: each attention block computes its own angles from the positions.

- **Hybrids** (Qwen3-Next, LFM2, Granite 4, Falcon-H1): layers carry a state from token to token.
  In training their own code computes these layers, text by text within packed rows; on a CPU state
  spaces (Mamba-2) read the texts by our scan.

- **Hybrids in decoding**: kernels pass the states of LFM2, Bamba, Granite 4, Falcon-H1, Qwen3-Next
  and Qwen3.5 on by one token. Prompts, and the layers of others, are computed by their own code,
  equal lengths side by side.

- **DeepSeek V2 and V3, MiniCPM3, GLM-4.7-Flash, Youtu** (latent attention): q and k are joined from
  two parts, of which one is rotated and shared by all key heads, and values are narrower than keys.

- **Gemma 4, Gemma 3n**: values have a norm, layers share keys and values, and each layer reads an
  input of its own.

- **nanochat**: its norms of heads have no weight, and it normalises its embeddings.
"""


def layer_paths(name: str) -> tuple[str, str]:
    """Returns how a family's layers are computed, in training and in decoding."""
    with quiet(), tempfile.TemporaryDirectory() as folder:
        base = veneer.load(str(save_family(name, Path(folder))), dtype="bfloat16", device="cpu")
        _ = base.paths  # switches the model to packed attention
        try:
            by_layers = forward_by_layers(base.model)
        except ValueError:  # its own code refuses a cache with states
            by_layers = prove_decoding(base.model)
        decoding = by_layers if isinstance(by_layers, str) else LAYERS
        base.attach(LoRA(rank=2), name="a")
        stand_ins = list(replacements(base.model).values())
    counts = Counter(type(stand_in) for stand_in in stand_ins)
    layers = [stand_in.facts for stand_in in stand_ins if isinstance(stand_in, FusedLayer)]
    kinds = [word for kind, word in KINDS.items() if counts[kind]]
    if any(layer.feed_forward is None for layer in layers):
        kinds = [HALF, *([KINDS[FusedGate]] if counts[FusedGate] else [])]
    elif layers:
        kinds = [WHOLE]
    return ", ".join(kinds) or OWN, decoding


def _reason(text: str) -> str:
    """Removes numbers, names of classes and lists of parts, in which equal reasons differ."""
    text = re.sub(r" by [\d.]+e[+-]\d+", "", text).replace("|", "/")
    text = re.sub(r"\b\w+(For\w+|LMHeadModel|Decoder)\b", "it", text)
    text = text.removeprefix("no layer of it is taken apart: ")
    text = re.sub(r"(other parts than Llama|it does not take [\w ]+)\b.*", r"\1", text)
    text = re.sub(r"it has no [\w, ]+", "its parts have other names", text)
    text = re.sub(r"only \d+ of \d+ layers of it .*", "some layers have no attention", text)
    return re.sub(r"\d+ times for \d+ layers", "more than once a layer", text)


def row_start(training: str, decoding: str) -> str:
    """Returns how a row of the page begins."""
    return f"| {training} | {_reason(decoding)} | "


def page(paths: dict[str, tuple[str, str]]) -> str:
    """Returns the page, with families of equal paths in one row."""
    groups: dict[str, list[str]] = {}
    for name, (training, decoding) in sorted(paths.items()):
        groups.setdefault(row_start(training, decoding), []).append(name)
    order = [WHOLE, HALF, *KINDS.values(), OWN]
    lines = ["| training | decoding | families |", "|---|---|---|"]
    for start, names in sorted(
        groups.items(),
        key=lambda item: (
            order.index(item[0][2:].split(" |")[0].split(",")[0]),
            LAYERS not in item[0],
            item[0],
        ),
    ):
        lines.append(f"{start}{'; '.join(names)} |")
    head = HEAD.format(date=f"{date.today().day} {date.today():%B %Y}")
    return "\n".join([head, *lines, END])


def main() -> None:
    names = [name for name, row in rows_of(FAMILIES.read_text()).items() if row.startswith("|")]
    paths = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=25) as pool:
        for name in names:
            try:
                paths[name] = pool.submit(layer_paths, name).result()
            except VeneerError as refusal:
                print(name, str(refusal).splitlines()[0], sep=" | ", flush=True)
            else:
                print(name, *paths[name], sep=" | ", flush=True)
    PAGE.write_text(page(paths))


if __name__ == "__main__":
    main()
