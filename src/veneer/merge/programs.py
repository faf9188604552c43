"""The programs that adapters are written for (`export --to`) and checked for (`lint --for`), each
by one name.

No torch here: `--help` reads this.
"""

from typing import Literal

Program = Literal["peft", "transformers", "vllm", "llamacpp", "ollama"]

ONE_FILE: tuple[Program, ...] = ("llamacpp",)
"""Those that read one file, in a type of its own, and a whole model where it is merged; the others
read folders."""
WHOLE_MODEL: tuple[Program, ...] = ("ollama",)
"""Those that get base and adapter as one model."""

ModelType = Literal["f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"]
"""Of a merged .gguf model."""
BY_LLAMA_CPP: dict[str, str] = {"q6_k": "Q6_K", "q5_k_m": "Q5_K_M", "q4_k_m": "Q4_K_M"}
"""Types that llama.cpp's own program makes, as it calls them."""
