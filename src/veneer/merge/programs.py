"""Programs that adapters are exported for (`export --to`) and checked for (`lint --for`).

Imports no torch: `--help` reads this.
"""

from typing import Literal

Program = Literal["peft", "transformers", "vllm", "llamacpp", "ollama"]

ONE_FILE: tuple[Program, ...] = ("llamacpp",)
"""Programs that read one file, in their own types; the others read folders."""
WHOLE_MODEL: tuple[Program, ...] = ("ollama",)
"""Programs that get base and adapter as one merged model."""

AdapterType = Literal["f32", "f16", "bf16"]
"""Types of an adapter's tensors in files; a .gguf adapter is f32 or f16."""
ModelType = Literal["f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"]
"""Types of a merged .gguf model."""
BY_LLAMA_CPP: dict[str, str] = {"q6_k": "Q6_K", "q5_k_m": "Q5_K_M", "q4_k_m": "Q4_K_M"}
"""Types that llama.cpp's own program makes, by its names."""
