"""A decoding step of llama.cpp over a .gguf file, in a process without torch: decoding_step.py
starts it and asks.

    python benchmarks/llama_step.py FILE.gguf --rows 16 --threads 2

Every line of its input is one run (all prompts read, then one token a row and step, the likeliest);
a line of JSON answers it. Its own process, since llama.cpp sets a thread's tiles (AMX) up once and
other code of the same threads may use them too. Its Python binding is the extra llamacpp.
"""

import argparse
import json
import random
import statistics
import sys
import time

import llama_cpp
import numpy as np


def prompts(rows: int, length: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(100, 40000) for _ in range(length)] for _ in range(rows)]


class LlamaCpp:
    """`rows` sequences in one batch, read whole and then answered by `new` tokens each."""

    def __init__(self, file: str, rows: int, threads: int, read: int, new: int) -> None:
        self.rows, self.read, self.new = rows, read, new
        self.model = llama_cpp.llama_model_load_from_file(
            file.encode(), llama_cpp.llama_model_default_params()
        )
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = rows * (read + new + 64)
        settings.n_batch = settings.n_ubatch = rows * read
        settings.n_seq_max = rows
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.batch = llama_cpp.llama_batch_init(rows * read, 0, 1)
        self.tokens = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def best(self, parts: list[list[int]], first: int) -> list[list[int]]:
        """The likeliest token behind each part, which begins at place `first` of its row."""
        batch, last, count = self.batch, [], 0
        for row, part in enumerate(parts):
            for place, token in enumerate(part, first):
                batch.token[count], batch.pos[count] = token, place
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, row
                batch.logits[count] = place == first + len(part) - 1
                count += 1
            last.append(count - 1)
        batch.n_tokens = count
        if llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError("llama.cpp did not decode the batch")
        found = (llama_cpp.llama_get_logits_ith(self.context, number) for number in last)
        return [[int(np.ctypeslib.as_array(logits, (self.tokens,)).argmax())] for logits in found]

    def run(self) -> dict[str, float]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        start = time.perf_counter()
        parts, steps = self.best(prompts(self.rows, self.read), 0), []
        for place in range(self.read, self.read + self.new - 1):
            began = time.perf_counter()
            parts = self.best(parts, place)
            steps.append(time.perf_counter() - began)
        whole = time.perf_counter() - start
        return {
            "ms a step": 1e3 * statistics.median(steps),
            "tokens/s": self.rows * self.new / whole,
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", metavar="FILE.gguf")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--read", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    asked = parser.parse_args()
    model = LlamaCpp(asked.file, asked.rows, asked.threads, asked.read, asked.new)
    for _ in sys.stdin:
        print(json.dumps(model.run()), flush=True)


if __name__ == "__main__":
    main()
