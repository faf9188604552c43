"""The programs that adapters are written for (`export --to`) and checked for (`lint --for`), each by one name.

No torch here: `--help` reads this.
"""

from typing import Literal

Program = Literal["peft", "transformers", "vllm", "llamacpp"]

ONE_FILE: tuple[Program, ...] = ("llamacpp",)
"""Those that read one file, in a type of its own, and a whole model where it is merged; the others read folders."""
