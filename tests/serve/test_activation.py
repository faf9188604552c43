"""A server answers with adapters that have an activation, over what it computed for the base."""

from tests.serve.server import BASE, made_base, running
from tests.support.helpers import fill
from veneer.adapters.config import LoRA
from veneer.decoding.generate import generate
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.library.library import Library

LONG = [5 + n * 37 % 240 for n in range(100)]
PROMPT = [*LONG, 250, 251, 6]


def test_adapters_answer_over_the_bases_prompt_and_act_alone(tmp_path):
    base, library = made_base(), Library(tmp_path / "library")
    expected = {}
    for seed, name in enumerate(("one", "two")):
        adapter = base.attach(LoRA(rank=3, alpha=5.0, activation=[250, 251]), name=name, seed=seed)
        fill(adapter.parameters().values(), seed=seed, scale=0.1)
        manifest = manifest_for(base, method="lora")
        write_adapter(tmp_path / name, adapter, manifest, model=base.model)
        library.add(tmp_path / name, name=name)
        with base.using(name):
            expected[name] = generate(base, [PROMPT], max_new_tokens=6)[0]
    expected[BASE] = generate(base, [PROMPT], max_new_tokens=6)[0]
    with running(library) as server:

        def asked(model, **fields):
            body = {"model": model, "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
            return server.post("/v1/completions", {**body, "logprobs": 1, **fields})

        for name, cached in ((BASE, 0), ("one", 96), ("two", 96)):
            answer = asked(name).json()
            text = answer["choices"][0]["logprobs"]["tokens"]
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == cached
            assert len(text) >= len(expected[name])
            plain = base.tokenizer.decode(expected[name])
            assert answer["choices"][0]["text"] == plain
        both = asked(BASE, adapters=[{"name": "one"}, {"name": "two"}])
        assert both.status_code == 400 and "acts alone" in both.text
