"""Served over folders that other programs packed: what an engine's step gives beside others is what
each answer is alone, and what the server says is what the base says itself."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.adapters.test_methods import move
from tests.serve.server import add_adapter, running
from tests.support.models.packed import packed_modules
from tests.support.models.packed_folders import write_awq, write_fp8, write_gptq, write_mxfp4
from tests.support.tiny import save_tiny
from veneer import api
from veneer.adapters.attach import attach
from veneer.adapters.config import Bottleneck, DoRA, LoRA
from veneer.bases.stop_tokens import stop_token_ids
from veneer.decoding.engine import Engine, bytes_per_token
from veneer.decoding.generate import generate
from veneer.decoding.sampling.sampling import Sampling
from veneer.decoding.schedule.adapters import FixedAdapters
from veneer.decoding.schedule.limits import Limits
from veneer.decoding.schedule.sequence import Request
from veneer.library.library import Library
from veneer.models.load import load_base

FOLDERS = {
    "fp8": ("llama", write_fp8),
    "fp8, experts": ("mixtral", write_fp8),
    "gptq": ("llama", write_gptq),
    "gptq, order": ("llama", lambda folder: write_gptq(folder, act_order=True)),
    "awq": ("qwen2", write_awq),
    "mxfp4": ("gpt_oss", write_mxfp4),
}
PROMPTS = [[5, 9, 30, 7, 5], [5, 9, 30, 11, 12, 13, 14, 15, 16, 17, 18, 19], [7]]
every_folder = pytest.mark.parametrize("name", FOLDERS)


def base_of(tmp_path, name):
    family, write = FOLDERS[name]
    folder = save_tiny(tmp_path / "base", family, torch.bfloat16, seed=1)
    write(folder)
    base = load_base(str(folder), dtype="float32", device="cpu")
    assert packed_modules(base.model)
    return base


@every_folder
def test_an_engine_s_answers_are_those_alone_and_those_of_generate(name, tmp_path):
    base = base_of(tmp_path, name)
    _ = base.paths
    fused = base.model.config.model_type in ("gpt_oss", "mixtral")
    second = (
        LoRA(rank=2, alpha=5.0) if fused else DoRA(rank=2, alpha=5.0)
    )  # which experts' matrices refuse
    for number, (own, config) in enumerate(
        {"a": LoRA(rank=3, alpha=5.0), "b": second, "c": Bottleneck(size=5)}.items()
    ):
        head = base.model.get_output_embeddings()
        move(
            attach(base.model, config, name=own, routing=base.routing, head=head, seed=number),
            seed=number,
        )
    names = [(), (("a", 1.0),), (("b", 0.7),), (("c", 1.0),)]
    applied = {name: base.routing.applied(name) for name in names if name}
    asked = [(who, prompt) for prompt in PROMPTS for who in names]

    def answers(some, limits=None):
        engine = Engine(
            base,
            budget_bytes=4096 * bytes_per_token(base),
            adapters=FixedAdapters(applied),
            limits=limits or Limits(),
        )
        how = Sampling(logprobs=5)
        made = [
            engine.add(Request(prompt=tuple(p), max_new_tokens=5, adapter=w, sampling=how))[0]
            for w, p in some
        ]
        engine.run()
        return [(sequence.new, [step.logprob for step in sequence.logprobs]) for sequence in made]

    together, chunks = (
        answers(asked),
        answers(asked, Limits(rows=5, step_tokens=40, chunk_tokens=7)),
    )
    alone = [answers([one])[0] for one in asked]
    for mixed in (together, chunks):
        assert [new for new, _ in mixed] == [new for new, _ in alone]
        for (_, chances), (_, own) in zip(mixed, alone, strict=True):
            assert chances == pytest.approx(own, abs=1e-4)
    assert (
        len(
            {
                tuple(new)
                for (_, prompt), (new, _) in zip(asked, alone, strict=True)
                if prompt == PROMPTS[1]
            }
        )
        > 1
    )
    for active in names:
        base.routing.active = active
        own = [
            _until_stop(base, new)
            for (who, _), (new, _) in zip(asked, alone, strict=True)
            if who == active
        ]
        assert generate(base, PROMPTS, max_new_tokens=5) == own


def _until_stop(base, new):
    stops = stop_token_ids(base.tokenizer, base.model.generation_config)
    return [*itertools.takewhile(lambda token: token not in stops, new)]


@pytest.mark.parametrize("name", ["fp8", "gptq, order", "awq", "mxfp4"])
def test_a_server_over_it_answers_for_base_and_adapter_what_they_say_themselves(name, tmp_path):
    folder = tmp_path / "base"
    base_of(tmp_path, name)
    base = api.load(str(folder), dtype="float32", device="cpu")
    library = Library(tmp_path / "adapters")
    add_adapter(
        library, tmp_path / "made", "mine", 3, api.load(str(folder), dtype="float32", device="cpu")
    )
    base.load_adapter(tmp_path / "made", name="mine")
    asked = ["what is 3", "say a longer thing: b c d e f"]
    with base.using(None):
        expected = {"tiny": base.generate(asked, max_new_tokens=6)}
    with base.using("mine"):
        expected["mine"] = base.generate(asked, max_new_tokens=6)
    assert expected["tiny"] != expected["mine"]
    served = api.load(str(folder), dtype="float32", device="cpu")
    with running(library, base=served) as server, ThreadPoolExecutor(4) as many:

        def said(model, prompt):
            body = {
                "model": model,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": 6,
                "temperature": 0,
            }
            return server.post("/v1/chat/completions", body).json()["choices"][0]["message"][
                "content"
            ]

        for _ in range(2):
            jobs = {(m, p): many.submit(said, m, p) for m in expected for p in asked}
            assert {m: [jobs[m, p].result() for p in asked] for m in expected} == expected
