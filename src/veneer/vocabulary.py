"""What other tools call our settings and flags, and which of ours somebody meant.

Loads nothing: the command line asks before it has loaded anything, settings in Python and in run files ask too.
"""

from collections.abc import Iterable
from difflib import get_close_matches

KeyPath = tuple[str, ...]
"""("method", "rank")"""

# Closer to what was meant than the nearest spelling is.
KNOWN_ELSEWHERE = {
    "adapter": "from_adapter",
    "adapter_name_or_path": "from_adapter",
    "batch_size": "batch",
    "chat_template_kwargs": "template.variables",
    "dataset": "data",
    "enable_thinking": "template.variables",
    "gradient_checkpointing": "checkpointing",
    "iters": "steps",
    "load_in_4bit": "quantize",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "lora_r": "method.rank",
    "lora_rank": "method.rank",
    "lr": "learning_rate",
    "max_grad_norm": "clip",
    "max_length": "length",
    "max_seq_length": "length",
    "max_steps": "steps",
    "micro_batch_size": "micro_batch",
    "model": "base",
    "model_name_or_path": "base",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "output_dir": "out",
    "per_device_train_batch_size": "batch",
    "r": "method.rank",
    "target_modules": "method.targets",
    "torch_dtype": "dtype",
    "train_batch_size": "batch",
    "warmup_ratio": "warmup",
}
"""Their name -> the path of our setting."""

CHOICES_ELSEWHERE = {
    "4bit": "nf4",
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "gguf": "llamacpp",
    "hf": "transformers",
    "llama.cpp": "llamacpp",
    "q8": "q8_0",
    "q4": "q4_k_m",
}
"""A value of theirs -> ours, where a flag takes it."""

FLAGS_ELSEWHERE = {
    "device_map": "device",
    "lora": "adapter",
    "lora_path": "adapter",
    "max_length": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "n_predict": "max_new_tokens",
    "o": "out",
    "output": "out",
    "peft_model": "adapter",
    "system_prompt": "system",
    "temp": "temperature",
    "test": "data",
}
"""Their name -> a flag of ours that is no setting of a run."""


def nearest(asked: KeyPath, ours: Iterable[KeyPath]) -> KeyPath | None:
    """Which of our names was meant by one that is none: one spelt like it in the same place, another tool's name for
    one of ours, one of that name elsewhere, or else one that resembles it."""
    paths = list(ours)
    *around, key = asked
    here = {path[-1]: path for path in paths if list(path[:-1]) == around}
    for name in get_close_matches(key, here, n=1, cutoff=0.8):
        return here[name]
    for table in (KNOWN_ELSEWHERE, FLAGS_ELSEWHERE):
        known = tuple(table[key].split(".")) if key in table else ()
        for path in [path for path in paths if path == known] + [path for path in paths if path[-1:] == known[-1:]]:
            return path
    for path in paths:
        if path[-1] == key:
            return path
    for name in get_close_matches(key, here, n=1, cutoff=0.5):
        return here[name]
    return None
