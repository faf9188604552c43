"""Adapters loaded, asked and unloaded over and over, new versions among them: what each took comes
back."""

import gc
import time
import weakref

from tests.serve.server import made_base, running
from tests.soak.counts import rounds
from tests.support.helpers import fill
from veneer.adapters.config import LoRA
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.library.library import Library
from veneer.training.output.records import process_memory_bytes

CYCLES = len(rounds("cycles", ci=12))
WARM = 10
"""Cycles until what is made once is made: threads, caches, the allocator's own pages."""
NAMES = ["one", "two", "three"]
VERSION_EVERY = 10
ROOM = 32 * 2**20
"""Bytes that the process may grow by: what a few adapters take. All that are loaded take a hundred
times that."""
SIZES = {"hidden_size": 256, "intermediate_size": 512}


def save_adapter(folder, seed):
    """An adapter's folder."""
    base = made_base(**SIZES)
    adapter = base.attach(LoRA(rank=96, alpha=5.0), name="a", seed=seed)
    fill(adapter.parameters().values(), seed=seed)
    write_adapter(folder, adapter, manifest_for(base, method="lora"), model=base.model)
    return folder


def test_what_an_adapter_took_comes_back_when_it_is_unloaded(tmp_path):
    library = Library(tmp_path / "adapters")
    for seed, name in enumerate(NAMES):
        library.add(save_adapter(tmp_path / name, seed), name=name)
    # made ahead: the models that this takes are not what is measured
    later = [
        save_adapter(tmp_path / str(seed), seed)
        for seed in range(3, 3 + (WARM + CYCLES) // VERSION_EVERY)
    ]
    size = library.get("one").version.facts.bytes
    with running(library, base=made_base(**SIZES)) as server, server.http() as http:
        before, seen, said = 0, [], {}

        def load(name):
            found = http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": name})
            assert found.status_code == 200, found.text

        def cycle(number):
            name = NAMES[number % len(NAMES)]
            if number % VERSION_EVERY == VERSION_EVERY - 1:
                library.add(later.pop(), name=name)
            load(name)
            content = library.get(name).version.facts.content_hash
            body = {
                "model": name,
                "prompt": [7, 8, 9],
                "max_tokens": 4,
                "temperature": 0,
                "ignore_eos": True,
            }
            found = http.post("/v1/completions", json=body)
            assert found.status_code == 200, found.text
            assert (
                said.setdefault(content, found.json()["choices"][0]["text"])
                == found.json()["choices"][0]["text"]
            )
            seen.extend(weakref.ref(attachment) for attachment in server.base.attachments.values())
            assert server.service.residents.tiers.used_bytes() > 0
            gone = http.post("/v1/unload_lora_adapter", json={"lora_name": name})
            assert gone.status_code == 200, gone.text
            assert http.post("/v1/completions", json=body).status_code == 404

        for number in range(WARM + CYCLES):
            if number == WARM:
                before = process_memory_bytes()
            cycle(number)
        server.ask_engine(lambda engine: engine.step(0.0))  # what the last step held is let go
        assert server.service.residents.tiers.used_bytes() == 0
        for _ in range(200):  # the thread that lets go of an adapter may be behind
            if not server.base.attachments:
                break
            time.sleep(0.02)
        assert not server.base.attachments
        assert server.service.residents.tiers.shown() == []
        gc.collect()
        assert [ref() for ref in seen if ref() is not None] == []
        grown = process_memory_bytes() - before
        assert grown < ROOM, f"{grown:,} bytes after {CYCLES:,} cycles of {size:,}"
        print(
            f"{CYCLES:,} cycles of {size:,} bytes, {len(said)} versions: {grown:,} bytes more than"
            " before"
        )
