"""Tokens that an adapter brings: their rows alone train, the base and the rows of others see none
of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import veneer
from tests.support.helpers import ended_before_step
from tests.support.tiny import VOCAB_SIZE, save_tiny, tiny_model
from veneer.adapters.config import Bottleneck, DoRA, LoRA, Prefix
from veneer.adapters.placement.acting import Acting, BatchPart
from veneer.adapters.preamble import Preamble
from veneer.data.template.new_tokens import bring, extended
from veneer.decoding.engine import Engine
from veneer.decoding.sampling.sampling import Sampling
from veneer.decoding.schedule.adapters import FixedAdapters
from veneer.decoding.schedule.sequence import Request
from veneer.errors import AdapterMismatchError, ConfigError, RefusedError, VeneerError
from veneer.files.strict_json import read_json
from veneer.formats.adapter import manifest_for, read_adapter, write_adapter
from veneer.formats.loading import load_adapter
from veneer.kernels.dense.loss import (
    Head,
    TrainedHeadRows,
    frozen_head_loss,
    frozen_head_nats,
    head_loss_reference,
    head_nats,
    head_nats_reference,
)
from veneer.merge.fold.merge_run import merge_adapters
from veneer.models.load import load_base
from veneer.serve.engine.prompts import Prompts
from veneer.serve.engine.token_text import TokenTexts
from veneer.serve.protocols.request import TextPrompt
from veneer.training.config import RunConfig
from veneer.training.output.screen import QuietScreen
from veneer.training.run import run_training

FEW = ["<order>", "</order>"]
"""Within the padded rows of the tiny models."""
MANY = [f"<tag {n}>" for n in range(20)]
"""Some of them behind their tables."""
METHODS = {
    "lora": LoRA(rank=2, alpha=3.0),
    "lora on both tables": LoRA(rank=2, alpha=3.0, targets=["embed_tokens", "lm_head", "q_proj"]),
    "dora": DoRA(rank=2, alpha=6.0),
    "bottleneck": Bottleneck(size=3),
    "prefix": Prefix(tokens=4, start="random"),
}


@pytest.fixture(scope="module", params=["llama", "llama_untied", "gemma3", "gemma2"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp(request.param)
    save_tiny(place, request.param)
    return veneer.load(str(place))


@pytest.fixture
def base(family: Any) -> Iterator[Any]:
    """One of each family, without adapters."""
    yield family
    family.use(None)
    for name in list(family.attachments):
        family.detach(name)


@pytest.fixture(scope="module")
def untied(world: Path) -> Any:
    return veneer.load(str(world / "base"))


@pytest.fixture
def plain(untied: Any) -> Iterator[Any]:
    yield untied
    untied.use(None)
    for name in list(untied.attachments):
        untied.detach(name)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("world")
    save_tiny(place / "base", "llama_untied")
    rows = [{"prompt": f"number {n}", "completion": f"<order>it is {n}</order>"} for n in range(12)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def logits(base: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return base.model(torch.tensor([ids]), use_cache=False).logits[0]


def moved(adapter: Any, seed: int = 0, scale: float = 0.1) -> Any:
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * scale
            )
    return adapter


OLD = [5, 77, 100, 9, 31, 200, 4, 8]


@pytest.mark.parametrize("texts", [FEW, MANY], ids=["padded", "behind"])
def test_no_steps_change_no_logit_of_old_ids_and_the_rows_start_as_their_pieces_mean(
    base: Any, texts: list[str]
) -> None:
    before, state = logits(base, OLD), {n: p.clone() for n, p in base.model.state_dict().items()}
    adapter = base.attach(LoRA(rank=2), name="a", new_tokens=texts)
    assert torch.equal(logits(base, OLD), before)
    base.use("a")
    found, own = logits(base, OLD), len(base.tokenizer)
    assert torch.equal(found[:, :own], before[:, :own])
    assert found.shape[-1] == max(VOCAB_SIZE, own + len(texts))
    pieces = base.tokenizer(texts[1], add_special_tokens=False)["input_ids"]
    table = base.model.get_input_embeddings().weight
    first = next(iter(adapter.tokens.places.values())).rows[1]
    assert torch.allclose(first, table[pieces].float().mean(0))
    assert len(adapter.tokens.places) == (1 if base.config.tie_word_embeddings else 2)
    moved(adapter)
    assert not torch.equal(logits(base, [*OLD, own])[-1], found[-1])
    base.use(None)
    assert torch.equal(logits(base, OLD), before)
    base.detach("a")
    assert torch.equal(logits(base, OLD), before)
    assert all(torch.equal(p, state[n]) for n, p in base.model.state_dict().items())


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("texts", [FEW, MANY], ids=["padded", "behind"])
def test_an_adapter_comes_back_as_it_was_written(
    plain: Any, tmp_path: Path, config: Any, texts: list[str]
) -> None:
    base = plain
    adapter = moved(base.attach(config, name="a", new_tokens=texts))
    base.use("a")
    asked = [*OLD, len(base.tokenizer) + len(texts) - 1]
    before = logits(base, asked)
    written = write_adapter(
        tmp_path / "a", adapter, manifest_for(base, method=config.name), model=base.model
    )
    base.detach("a")
    again = read_adapter(written.path)
    assert again.manifest is not None and again.manifest.new_tokens == texts
    base.load_adapter(written.path, name="b")
    base.use("b")
    assert torch.equal(logits(base, asked), before)
    assert base.acting_tokenizer.decode(asked[-1:]) == texts[-1]
    assert base.acting_tokenizer(f"a{texts[0]}b", add_special_tokens=False)["input_ids"][1] == len(
        base.tokenizer
    )


def test_alone_is_as_in_the_mix(base: Any) -> None:
    one = moved(base.attach(METHODS["lora"], name="one", new_tokens=MANY), seed=1)
    two = moved(base.attach(METHODS["lora"], name="two", new_tokens=FEW), seed=2)
    asked = {"one": [5, 259, 270, 275], "two": [6, 260, 259, 9], "": [7, 8, 9, 200]}
    alone = {}
    for name, ids in asked.items():
        base.use(name or None)
        alone[name] = logits(base, ids)
    parts = tuple(BatchPart(4, applied) for applied in (((one, 1.0),), ((two, 1.0),), ()))
    with torch.no_grad(), base.routing.held(Acting(parts)):
        found = base.model(torch.tensor(list(asked.values())), use_cache=False).logits
    for row, (name, before) in zip(found, alone.items(), strict=True):
        width = before.shape[-1]
        assert torch.allclose(row[:, :width], before, atol=1e-5, rtol=1e-5), name
    with pytest.raises(ConfigError, match="one adapter with new tokens may act, and with weight 1"):
        base.use(["one", "two"])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_in_the_mix_are_those_alone(plain: Any, temperature: float) -> None:
    base = plain
    one = moved(base.attach(METHODS["lora"], name="one", new_tokens=MANY), seed=1, scale=0.5)
    two = moved(base.attach(METHODS["lora"], name="two"), seed=2, scale=0.5)
    acting = {(("one", 1.0),): ((one, 1.0),), (("two", 1.0),): ((two, 1.0),)}

    def answers(asked: list[Any]) -> list[Any]:
        engine = Engine(base, budget_bytes=2**20, adapters=FixedAdapters(acting))
        sampling = Sampling(temperature=temperature)
        prompt = {
            identity: (5, 6, 275) if identity == (("one", 1.0),) else (5, 6, 7)
            for identity in asked
        }
        made = [
            engine.add(
                Request(prompt=prompt[i], max_new_tokens=12, adapter=i, sampling=sampling, seed=3)
            )[0]
            for i in asked
        ]
        engine.run()
        return [(sequence.error, sequence.answer) for sequence in made]

    identities = [*acting, ()]
    together = answers(identities)
    assert together == [answers([identity])[0] for identity in identities]
    assert all(error is None and len(answer) == 12 for error, answer in together)


def test_a_server_reads_and_says_the_tokens_of_an_adapter_alone(plain: Any) -> None:
    prompts, texts = (
        Prompts(plain.tokenizer, positions=100, ids=VOCAB_SIZE),
        TokenTexts(plain.tokenizer),
    )
    own = prompts.encode(TextPrompt(text="a<order>"), Preamble(tokens=("<order>",)))
    assert own == [*plain.tokenizer("a")["input_ids"], len(plain.tokenizer)]
    assert len(prompts.encode(TextPrompt(text="a<order>"))) == 8
    assert texts.with_tokens(("<order>",)).logprob(own[1], -1.0).text == "<order>"
    prompts.close()


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bias", [False, True])
def test_the_loss_in_chunks_is_the_references(softcap: float | None, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    at = torch.tensor([41, 12, 40, 42])  # one among the base's own 40
    h, rows = drawn(300, 16).requires_grad_(), drawn(4, 16).requires_grad_()
    beside = TrainedHeadRows(rows, at, drawn(4) if bias else None)
    head = Head(drawn(40, 16), drawn(40) if bias else None, 0.7, softcap, beside, columns=43)
    targets = torch.randint(0, 43, (300,), generator=generator)
    found, grads = [], []
    for loss in (frozen_head_loss, head_loss_reference):
        value = loss(h, targets, head, 77.0)
        found.append(value.detach())
        grads.append(torch.autograd.grad(value * 3, (h, rows)))
    assert torch.allclose(*found, rtol=1e-5)
    assert torch.allclose(head_nats(h, targets, head).sum() / 77, found[0], rtol=1e-5)
    for mine, theirs in zip(*grads, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5, rtol=1e-4)
    weights = drawn(300)
    nats = [function(h, targets, head) for function in (frozen_head_nats, head_nats_reference)]
    assert torch.allclose(*nats, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(row_nats @ weights, (h, rows)) for row_nats in nats]
    for mine, theirs in zip(*grads, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4, rtol=1e-4)


def test_texts_that_cannot_be_new_tokens_are_refused_with_both_sides() -> None:
    base = {"base": "b", "data": "d", "out": "o"}
    for texts, said in (
        (["<a>", "<a>"], "a duplicate"),
        ([""], "is empty"),
        (["a "], "ends with a space"),
        (["x" * 300], "300 characters"),
        ([f"<{n}>" for n in range(5000)], "the limit is 4,096"),
    ):
        with pytest.raises((ConfigError, VeneerError), match=said):
            RunConfig.of({**base, "new_tokens": texts})
    with pytest.raises(VeneerError, match="method full trains"):
        RunConfig.of({**base, "new_tokens": ["<a>"], "method": "full"})


def test_a_text_that_is_a_token_already_is_refused(plain: Any) -> None:
    tokenizer = plain.tokenizer
    known = tokenizer.convert_ids_to_tokens(257)
    with pytest.raises(ConfigError, match="is token 257 of the base already"):
        bring(tokenizer, [known], rows=VOCAB_SIZE)
    with pytest.raises(ConfigError, match="without a row"):
        bring(tokenizer, ["<a>"], rows=200)
    assert extended(tokenizer, ()) is tokenizer


def run_of(world: Path, out: Path, **fields: Any) -> RunConfig:
    own = {
        "base": str(world / "base"),
        "data": str(world / "rows.jsonl"),
        "out": str(out),
        "steps": 4,
        "batch": 4,
    }
    return RunConfig.of(
        {**own, "new_tokens": FEW, "learning_rate": 1e-2, "evaluate_every": 2, **fields}
    )


@pytest.mark.parametrize(
    ("method", "quantize"),
    [("lora", None), ("lora on both tables", "nf4"), ("prefix", None), ("dora", "nf4")],
)
def test_a_run_trains_the_rows_and_an_answer_may_say_them(
    world: Path, tmp_path: Path, method: str, quantize: str | None
) -> None:
    config = METHODS[method]
    fields = {
        "method": config.model_dump(exclude_defaults=True) | {"name": config.name},
        "quantize": quantize,
    }
    summary = run_training(
        run_of(world, tmp_path / "run", **fields), resume=False, screen=QuietScreen()
    )
    assert summary["last_loss"] < summary["first_loss"]
    stored = read_adapter(tmp_path / "run" / "adapter")
    base = veneer.load(str(world / "base"), quantize=quantize)
    fresh = base.attach(LoRA(rank=1), name="fresh", new_tokens=FEW).tokens.places
    rows = {
        n.split(".token_adapter")[0]: t for n, t in stored.tensors.items() if ".token_adapter." in n
    }
    assert rows.keys() == fresh.keys()
    assert all(not torch.equal(rows[path], fresh[path].rows) for path in rows)
    base.detach("fresh")
    base.load_adapter(tmp_path / "run" / "adapter", name="a")
    base.use("a")
    assert isinstance(base.generate("<order>number 3", max_new_tokens=4), str)
    found = veneer.api.evaluate(
        base, str(world / "rows.jsonl"), metrics=["exact_match"], max_new_tokens=4
    )
    assert found["loss"] > 0


def test_a_resumed_run_learns_the_same_bits(world: Path, tmp_path: Path) -> None:
    from veneer.cli import main

    run_training(run_of(world, tmp_path / "whole"), resume=False, screen=QuietScreen())
    with ended_before_step(2):
        run_training(run_of(world, tmp_path / "parts"), resume=False, screen=QuietScreen())
    assert main.main(["train", "--resume", str(tmp_path / "parts"), "--quiet"]) == 0
    whole, parts = (
        load_file(tmp_path / n / "adapter" / "adapter_model.safetensors")
        for n in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_an_adapter_goes_on_with_its_tokens_and_more(world: Path, tmp_path: Path) -> None:
    run_training(run_of(world, tmp_path / "one"), resume=False, screen=QuietScreen())
    one = tmp_path / "one" / "adapter"
    fields = {"from_adapter": str(one), "new_tokens": ["<more>"], "steps": 1, "learning_rate": 1e-9}
    run_training(run_of(world, tmp_path / "two", **fields), resume=False, screen=QuietScreen())
    two = read_adapter(tmp_path / "two" / "adapter")
    assert two.manifest is not None and two.manifest.new_tokens == [*FEW, "<more>"]
    before = {n: t for n, t in read_adapter(one).tensors.items() if ".token_adapter." in n}
    assert all(torch.allclose(two.tensors[n][:2], t, atol=1e-6) for n, t in before.items())


@pytest.mark.parametrize(
    ("texts", "config"),
    [(FEW, METHODS["lora"]), (MANY, METHODS["lora on both tables"])],
    ids=["padded", "behind"],
)
def test_a_merged_folder_has_the_tokens_and_answers_alike(
    base: Any, tmp_path: Path, texts: list[str], config: Any
) -> None:
    adapter = moved(base.attach(config, name="a", new_tokens=texts), scale=0.3)
    base.use("a")
    asked = [*OLD, len(base.tokenizer), len(base.tokenizer) + 1]
    before = logits(base, asked)
    write_adapter(tmp_path / "a", adapter, manifest_for(base, method="lora"), model=base.model)
    merge_adapters(base.source, [(tmp_path / "a", 1.0)], out=tmp_path / "merged")
    merged = load_base(str(tmp_path / "merged"))
    assert merged.tokenizer.convert_tokens_to_ids(texts) == list(adapter.tokens.ids)
    found = logits(merged, asked)
    assert found.shape == before.shape and torch.allclose(found, before, atol=1e-3, rtol=1e-3)
    with pytest.raises(RefusedError, match="tables would grow"):
        base.merge("a")


def test_what_cannot_take_rows_says_so(plain: Any, world: Path, tmp_path: Path) -> None:
    base = plain
    for name in ("a", "b"):
        adapter = moved(base.attach(METHODS["lora"], name=name, new_tokens=FEW))
        write_adapter(tmp_path / name, adapter, manifest_for(base, method="lora"), model=base.model)
    from veneer.merge.combine.combine import Recipe

    pair = [(tmp_path / "a", 1.0), (tmp_path / "b", 1.0)]
    with pytest.raises(RefusedError, match="cannot be combined into one adapter"):
        veneer.api.combine_adapters(
            pair, Recipe("cat"), base=str(world / "base"), out=tmp_path / "c"
        )
    for asked in (pair, [(tmp_path / "a", 0.5)]):
        with pytest.raises(
            ConfigError, match="one adapter with new tokens may act, and with weight 1"
        ):
            merge_adapters(str(world / "base"), asked, out=tmp_path / "m")
    text = (tmp_path / "a" / "veneer.json").read_text()
    (tmp_path / "a" / "veneer.json").unlink()
    plain.detach("a")
    other = plain
    with pytest.raises(AdapterMismatchError, match=r"no veneer\.json with its text"):
        load_adapter(other, tmp_path / "a", name="e")
    (tmp_path / "a" / "veneer.json").write_text(text.replace("<order>", "<other>"))
    load_adapter(other, tmp_path / "a", name="d")  # texts are the manifest's to say
    (tmp_path / "a" / "veneer.json").write_text(text.replace("<order>", "a"))
    with pytest.raises(ConfigError, match="of the base already"):
        load_adapter(other, tmp_path / "a", name="c")


@pytest.mark.parametrize("family", ["llama", "llama_untied"])
@pytest.mark.parametrize("texts", [FEW, MANY], ids=["padded", "behind"])
def test_peft_reads_it_and_computes_the_same(tmp_path: Path, family: str, texts: list[str]) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    save_tiny(tmp_path / "base", family)
    base = veneer.load(str(tmp_path / "base"))
    adapter = moved(base.attach(LoRA(rank=2, alpha=3.0), name="a", new_tokens=texts))
    base.use("a")
    asked = [*OLD, len(base.tokenizer), len(base.tokenizer) + 1]
    before = logits(base, asked)
    write_adapter(tmp_path / "a", adapter, manifest_for(base, method="lora"), model=base.model)
    settings = read_json(tmp_path / "a" / "adapter_config.json")
    assert settings["trainable_token_indices"].keys() == adapter.tokens.places.keys()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if len(base.tokenizer) + len(texts) > VOCAB_SIZE:
        plain.resize_token_embeddings(len(base.tokenizer) + len(texts))
    tuned = peft.PeftModel.from_pretrained(plain, tmp_path / "a").eval()
    with torch.no_grad():
        found = tuned(torch.tensor([asked])).logits[0]
    assert torch.allclose(found, before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "llama_untied"])
def test_tokens_that_peft_trained_are_read(tmp_path: Path, family: str) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    save_tiny(tmp_path / "base", family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["q_proj"],
        trainable_token_indices=[9, 3, 5],
        task_type="CAUSAL_LM",
    )
    tuned = peft.get_peft_model(model, settings).eval()
    with torch.no_grad():
        for number, (name, parameter) in enumerate(tuned.named_parameters()):
            if "lora_" in name or "tokens_delta" in name:
                parameter.add_(
                    torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                    * 0.2
                )
    tuned.save_pretrained(tmp_path / "a")
    base = veneer.load(str(tmp_path / "base"))
    base.load_adapter(tmp_path / "a", name="a")
    base.use("a")
    with torch.no_grad():
        expected = tuned(torch.tensor([[*OLD, 3, 9]])).logits[0]
    assert torch.allclose(logits(base, [*OLD, 3, 9]), expected, atol=1e-4, rtol=1e-4)


def test_a_model_without_a_plain_table_is_refused() -> None:
    from veneer.adapters.attach import attach
    from veneer.adapters.placement.routing import Routing
    from veneer.adapters.placement.token_rows import AddedTokens

    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="takes no new tokens"):
        attach(
            model,
            LoRA(rank=1),
            name="a",
            routing=Routing(),
            head=None,
            tokens=AddedTokens(("<a>",), (259,)),
        )
    assert not any(
        type(module).__module__.startswith("veneer.adapters") for module in model.modules()
    )
