"""Steps of others over the same rows: PEFT, over transformers' model or bitsandbytes' layers, and
Unsloth."""

from __future__ import annotations

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from place import Place
from steps import random_model, write_tokenizer


def peft_step(at: Place, *, quantize: bool = False) -> dict[str, Any]:
    """The same rows and rank by PEFT over transformers' model: as packed as rows can be, all being
    equally long. quantize: its linear layers held by bitsandbytes."""
    import peft

    model = random_model(at.model, torch.bfloat16, at.device).requires_grad_(False)
    if quantize:
        by_bitsandbytes(model)
    own = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, own)
    return {**stepped(at, tuned), "versions": {"peft": version("peft")}}


def by_bitsandbytes(model: torch.nn.Module) -> None:
    """Its linear layers but the head in NF4, in place."""
    import bitsandbytes

    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            held = bitsandbytes.nn.Linear4bit(
                module.in_features,
                module.out_features,
                False,
                torch.bfloat16,
                True,
                "nf4",
                device="meta",
            )
            weight = module.weight.detach().cpu()
            held.weight = bitsandbytes.nn.Params4bit(
                weight, False, quant_type="nf4", compress_statistics=True
            )
            model.set_submodule(path, held.to(module.weight.device))


def stepped(at: Place, tuned: Any) -> dict[str, Any]:
    """Steps of a model that others have made trainable."""
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=at.device.type == "cuda")
    ids = torch.randint(0, at.model.vocabulary, (at.rows, at.length), device=at.device)

    def step() -> None:
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    peak = at.peak_bytes(step)
    seconds = at.seconds(step)
    held = torch.cuda.memory_allocated(at.device) if at.device.type == "cuda" else None
    return {
        "tokens_per_second": at.rows * at.length / seconds,
        "peak_bytes": None if peak is None or held is None else peak + held,
    }


def unsloth_step(at: Place, *, quantize: bool = False) -> dict[str, Any]:
    """The same by Unsloth, over the same rows; written by its documentation, never run."""
    import unsloth

    with tempfile.TemporaryDirectory() as scratch:
        random_model(at.model, torch.bfloat16, at.device).save_pretrained(scratch)
        write_tokenizer(Path(scratch))
        torch.cuda.empty_cache()
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            scratch, max_seq_length=at.length, dtype=torch.bfloat16, load_in_4bit=quantize
        )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    tuned = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=32,
        lora_dropout=0,
        target_modules=targets,
        use_gradient_checkpointing=False,
    )
    return {**stepped(at, tuned), "versions": {"unsloth": version("unsloth")}}
