"""Every causal LM of transformers that can be built small, held against transformers and PEFT: the table of families.

    python -m tests.families              all of them; writes docs/families.md (half an hour)
    python -m tests.families mamba jamba  these rows of the page anew

For each a small random model: an adapter of Veneer's beside it, its file in PEFT on the same weights.
    path       what models/proof.py found: how rows are computed, and why not packed
    loss       of a batch with a shared prompt, rows on both sides of every window and rotary switch: ours, and the
               sum of PEFT's rows one by one
    gradient   of every trained value: ours, and torch's through the model's own forward, one row at a time
    to PEFT    our file in PEFT: the same logits
    from PEFT  PEFT's own "all-linear" file here, as its training could have left it: the same logits
    answers    greedy, prompts of four lengths at once, and transformers' own loop in PEFT, one at a time
What is not so for a reason that is not ours is declared in tests/families_declared.py; anything else is a fault.
"""

from __future__ import annotations

import copy
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.families_page import LIMITS, LOGITS, PAGE, Result, page, rows_of, words
from tests.helpers import fill, make_examples
from tests.tiny import tiny_tokenizer
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.bases.model_class import model_class
from veneer.bases.quiet_transformers import quiet
from veneer.decoding.generate import generate
from veneer.errors import RefusedError, VeneerError
from veneer.formats.adapter import load_adapter, manifest_for, write_adapter
from veneer.models.frozen_base import FrozenBase
from veneer.models.initial_values import begin
from veneer.models.step import batch_loss, batch_of, parts_of
from veneer.models.structure import drawn, small_copy
from veneer.models.switches import forget_lengths

WINDOW, SWITCH = 16, 32
"""Longer than what the proof's copies have, shorter than the rows and prompts here."""
IDS = 120
"""Token ids used: below every special one of a small copy."""
DECODER = {"is_decoder": True}
HEADS = {"head_dim": 32}
FIELDS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "bert",
            "bert-generation",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "reformer",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
            "xmod",
        ),
        DECODER,
    ),
    "bamba": {"attn_layer_indices": [1, 5]},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "hunyuan_v1_dense": HEADS,
    "hunyuan_v1_moe": HEADS,
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 6, "num_hidden_layers": 12},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "local"], "axial_pos_embds": False},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"] * 4, "num_hidden_layers": 12},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 16},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "falcon": {"hidden_size": 256, "num_attention_heads": 4},
    "dbrx": {
        "d_model": 256,
        "n_heads": 4,
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"moe_top_k": 2},
    },  # of one, the only weight is always 1: its router has no gradient
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        }
    },
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
}
"""What a default config lacks to be a decoder, or to be built at all."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 16}),
    "qwen2_moe, window": ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 16}),
    "phimoe, window": ("phimoe", {"sliding_window": 64}),
    "doge, window": ("doge", {"sliding_window": 64}),
    "olmoe, window": ("olmoe", {"sliding_window": 64}),
    "mixtral, window": ("mixtral", {"sliding_window": 64}),
    "phi3, longrope": (
        "phi3",
        {
            "original_max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 4096,
                "short_factor": [1.0 + 0.1 * i for i in range(48)],
                "long_factor": [2.0 + 0.5 * i for i in range(48)],
            },
        },
    ),
    "qwen3_5, images": ("qwen3_5", {"architectures": ["Qwen3_5ForConditionalGeneration"]}),
    "llama, dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}),
    "llama, yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
}
"""Settings that change the path, beside the defaults."""
WITH_IMAGES = ("mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe")
"""Checkpoints of texts and images that have no class for their text alone; it is trained with the tower left out."""
SAMPLE = (
    "qwen2_moe, window",
    "llama4_text",
    "phi3, longrope",
    "granite",
    "deepseek_v3",
    "mamba",
    "lfm2",
    "llama, dynamic",
)
"""Held in CI; the rest by `make soak`."""


def names() -> list[str]:
    return sorted([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *WITH_IMAGES, *VARIANTS])


def family_config(name: str) -> PreTrainedConfig:
    kind, own = VARIANTS.get(name, (name, {}))
    return CONFIG_MAPPING[kind](**{**FIELDS.get(kind, {}), **own})


_SMALL: dict[str, tuple[type[PreTrainedModel], PreTrainedConfig]] = {}


def family_model(name: str) -> PreTrainedModel:
    """Small and random, the same at every call; raises what transformers raises where it cannot be built."""
    with quiet():
        if name not in _SMALL:
            config = family_config(name)
            kind = model_class(config)
            if kind.config_class is not type(config):  # the text's part of a model that sees or hears
                config = config.get_text_config()
            _SMALL[name] = kind, small_copy(kind, config, window=WINDOW, switch=SWITCH).config
        kind, small = _SMALL[name]
        model = drawn(kind, copy.deepcopy(small))
    if model.generation_config is not None:
        model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    return model


def family_base(name: str) -> FrozenBase:
    return FrozenBase(family_model(name), tiny_tokenizer(), name, name)


def _apart(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    value = ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()
    return value if value == value else float("inf")


def _logits_apart(ours: Any, theirs: Any, ids: np.ndarray) -> float:
    """0 where they differ by what rounding explains: a model that goes round its layers many times makes much of it."""
    expected = _alone(theirs, ids)
    apart = _apart(_alone(ours, ids), expected)
    if apart <= LOGITS:
        return apart
    last_bit = 1 + 2.0**-23
    handle = theirs.get_input_embeddings().register_forward_hook(lambda _, __, rows: rows * last_bit)
    moved = _apart(_alone(theirs, ids), expected)
    handle.remove()
    return apart if apart > 10 * moved else 0.0


def _tried(run: Callable[[], float]) -> float | str:
    """A number, or in words why there is none."""
    try:
        return run()
    except Exception as fault:
        return _told(fault)


def _told(fault: Exception) -> str:
    if isinstance(fault, VeneerError):
        told = str(fault).split("\n")
        return "refused: " + words(" ".join(told[1:2] or told))
    if isinstance(fault, _NotInPeft):
        return "not in PEFT: " + words(str(fault))
    return f"FAULT {type(fault).__name__}: {words(str(fault))}"


class _NotInPeft(Exception):
    """PEFT or transformers itself does not do this."""


def _alone(model: Any, ids: np.ndarray) -> Tensor:
    """(T, V) of one text through the model's own forward."""
    forget_lengths(model)
    return model(input_ids=torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0]


def _nats(model: Any, examples: list[Any]) -> Tensor:
    """Cross-entropy of the trained tokens of every row alone, summed. What no loss depends on is left out, as in a
    step."""
    total = torch.zeros(())
    for example in examples:
        rows = np.flatnonzero(example.trained)
        logits = _alone(model, example.ids[: rows[-1]])
        targets = torch.from_numpy(example.ids[rows].astype(np.int64))
        total = total + F.cross_entropy(logits[rows - 1], targets, reduction="sum")
    return total


def _in_peft(name: str, folder: Path) -> Any:
    import peft

    model = family_model(name)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = peft.PeftModel.from_pretrained(model, folder).eval()
    except Exception as fault:
        raise _NotInPeft(f"{type(fault).__name__}: {fault}") from fault
    lost = [str(w.message) for w in caught if "missing" in str(w.message) or "nexpected" in str(w.message)]
    if lost and _own_is_found(name):
        raise ValueError(lost[0])
    if lost:
        raise _NotInPeft("it misses tensors of its own file of this model too")
    return loaded


def _own_is_found(name: str) -> bool:
    """Whether PEFT finds all tensors of what it wrote itself."""
    import peft

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _all_linear(name).save_pretrained(folder)
        peft.PeftModel.from_pretrained(family_model(name), folder)
    return not any("missing" in str(w.message) for w in caught)


def _all_linear(name: str) -> Any:
    import peft

    config = peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", target_modules="all-linear")
    return peft.get_peft_model(family_model(name), config).eval()


def _train(model: Any, ids: np.ndarray) -> None:
    """As if it had been: values everywhere, but where no gradient comes the update stays zero."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with suppress(AssertionError, RuntimeError):  # Reformer gives no gradient outside of train mode
        _alone(model, ids).square().sum().backward()
        trained = [parameter for parameter in trained if parameter.grad is not None]
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if any(parameter is each for each in trained):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * _scale(parameter))


def _scale(parameter: Tensor) -> float:
    return 0.3 * max(1, parameter.shape[-1]) ** -0.5


def measure(name: str) -> Result:
    """The row of one family."""
    result = Result(name)
    try:
        base = family_base(name)
    except Exception as fault:
        result.built = f"not built: {type(fault).__name__}: {words(str(fault))}"
        return result
    try:
        with quiet():
            paths = base.paths
    except VeneerError as refusal:
        result.built = _told(refusal)
        return result
    lines = [line for line in paths.lines if not line.startswith("logits only")]
    result.path = re.sub(r" by [\d.]+e[+-]\d+", "", "; ".join(lines)).replace("|", "/")  # not the last digit
    with tempfile.TemporaryDirectory() as folder, quiet():
        _compare(base, result, Path(folder))
    return result


def _compare(base: FrozenBase, result: Result, folder: Path) -> None:
    name, cells = result.name, result.cells
    examples = make_examples(5, vocab=IDS, prompt=5, longest=44)
    total = float(sum(e.trained.sum() for e in examples))
    untrained = None
    try:
        made = begin(base, LoRA(rank=3, alpha=5), name="a").attachment
    except RefusedError as refusal:  # it cannot be trained: what does not need that is compared all the same
        untrained, head = _told(refusal), base.model.get_output_embeddings()
        made = attach(base.model, LoRA(rank=3, alpha=5), name="a", routing=base.routing, head=head)
    except Exception as fault:
        cells.update(dict.fromkeys(LIMITS, _told(fault)))
        return
    for parameter in made.parameters().values():
        fill([parameter], seed=parameter.numel(), scale=_scale(parameter))
    base.routing.active = (("a", 1.0),)
    plain = base.model
    write_adapter(folder / "ours", made, manifest_for(base, method="lora"), model=plain)
    twin, reason = None, ""
    try:
        twin = _in_peft(name, folder / "ours")
    except Exception as fault:
        reason = _told(fault)

    def loss() -> float:
        parts = parts_of(base.model, base.paths, examples, [list(range(5))])
        batches = [batch_of(base.model, base.paths, examples, part, share_prompt=True) for part in parts]
        for parameter in made.parameters().values():
            parameter.requires_grad_(True).grad = None
        found = torch.zeros(())
        for batch in batches:
            part = batch_loss(base.model, base.paths, base.routing, batch, total=total)
            part.backward()
            found = found + part.detach()
        with torch.no_grad():
            expected = _nats(_theirs(), examples) / total
        return abs(found.item() - expected.item()) / expected.item()

    def _theirs() -> Any:
        return twin if twin is not None else _own().model

    def _own() -> Any:
        """The same adapter of ours through the model's own forward."""
        other = family_base(name)
        load_adapter(other, folder / "ours", name="a")
        other.routing.active = (("a", 1.0),)
        return other

    def gradient() -> float:
        other = _own()
        twins = other.attachments["a"].parameters()
        for parameter in twins.values():
            parameter.requires_grad_(True)
        (_nats(other.model, examples) / total).backward()
        worst = 0.0
        for key, parameter in made.parameters().items():
            # None: the text alone does not pass here (a vision tower, attention to an encoder)
            ours, theirs = (torch.zeros(1) if p.grad is None else p.grad for p in (parameter, twins[key]))
            if ours.any() or theirs.any():
                worst = max(worst, _apart(ours, theirs))
        return worst

    def to_peft() -> float:
        with torch.no_grad():
            return max(_logits_apart(base.model, twin, e.ids) for e in examples[:2])

    def from_peft() -> float:
        return _from_peft(name, folder / "theirs", [e.ids for e in examples[:2]])

    def answers() -> float:
        return _answers(base, _theirs())

    cells["loss"] = untrained or _tried(loss)
    cells["gradient"] = _tried(gradient) if isinstance(cells["loss"], float) else cells["loss"]
    cells["to PEFT"] = _tried(to_peft) if twin is not None else reason
    cells["from PEFT"] = _tried(from_peft)
    cells["answers"] = _tried(answers)


def _from_peft(name: str, folder: Path, texts: list[np.ndarray]) -> float:
    try:
        theirs = _all_linear(name)
        _train(theirs, texts[0])
        with torch.no_grad():
            _alone(theirs, texts[0])
        theirs.save_pretrained(folder)
    except Exception as fault:
        raise _NotInPeft(f"{type(fault).__name__}: {fault}") from fault
    base = family_base(name)
    load_adapter(base, folder, name="x")
    base.routing.active = (("x", 1.0),)
    with torch.no_grad():
        return max(_logits_apart(base.model, theirs, ids) for ids in texts)


def _answers(base: FrozenBase, twin: Any) -> float:
    """The share of answers that differ."""
    prompts = [[(7 * i + j * j) % IDS for j in range(length)] for i, length in enumerate((27, 4, 19, 38))]
    settings = GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    expected: list[Any] = []
    trouble = "answers otherwise"
    for prompt in prompts:
        ids = torch.tensor([prompt])
        forget_lengths(twin)
        try:
            out = twin.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
            expected.append(out[0, len(prompt) :].tolist())
        except Exception as fault:
            trouble = f"stops ({type(fault).__name__})"
            expected.append(None)
    found = generate(base, prompts, max_new_tokens=10)
    different = [i for i, answer in enumerate(found) if answer != expected[i]]
    if different and all(found[i] == _greedy(twin, prompts[i]) for i in different):
        raise _NotInPeft(f"as without a cache; with one transformers' own loop {trouble}")
    return len(different) / len(prompts)


@torch.no_grad()
def _greedy(model: Any, prompt: list[int]) -> list[int]:
    """Ten tokens, the whole text computed for each."""
    ids = list(prompt)
    for _ in range(10):
        ids.append(int(_alone(model, np.asarray(ids))[-1].argmax()))
    return ids[len(prompt) :]


def main(asked: list[str]) -> None:
    rows = rows_of(PAGE.read_text()) if asked and PAGE.exists() else {}
    for name in asked or names():
        start = time.perf_counter()
        result = measure(name)
        rows[name] = result.row
        numbers = {k: f"{v:.1e}" if isinstance(v, float) else v for k, v in result.cells.items()}
        print(f"{name}  {time.perf_counter() - start:.1f} s  {result.built or result.path}\n    {numbers}", flush=True)
        PAGE.write_text(page(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
