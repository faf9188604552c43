"""How long a request may be is known before it waits: behind an adapter's prefix, and where
frequencies change."""

import asyncio

import pytest
from transformers import PreTrainedTokenizerFast

from tests.models.test_proof import ROTARY
from tests.serve.server import BASE, add_adapter, made_base, running
from tests.support.helpers import fill
from tests.support.tiny import tiny_tokenizer
from veneer.adapters.config import Prefix
from veneer.adapters.preamble import NONE
from veneer.data.template.tokens import TextTokenizer
from veneer.decoding.engine import BLOCK_SLOTS
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.library.library import Library
from veneer.serve.engine import prompts as prompts_module
from veneer.serve.engine.prompts import Prompts
from veneer.serve.engine.token_budget import BYTES_PER_TOKEN, PIECE, TokenBudget
from veneer.serve.protocols.request import ChatPrompt, TextPrompt
from veneer.serve.refusals import Refusal

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
POSITIONS, PLACES = 128, 20


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("room")
    library = Library(folder / "adapters")
    base = made_base(max_position_embeddings=POSITIONS)
    made = base.attach(Prefix(tokens=PLACES, start="random"), name="a", seed=1)
    fill(made.parameters().values(), seed=1)
    write_adapter(folder / "prefix", made, manifest_for(base, method="prefix"), model=base.model)
    library.add(folder / "prefix", name="prefix")
    add_adapter(
        library, folder / "tickets", "tickets", 2, made_base(max_position_embeddings=POSITIONS)
    )
    return library


@pytest.fixture(scope="module")
def server(library):
    with running(library, base=made_base(max_position_embeddings=POSITIONS)) as found:
        yield found


def ask(server, path, status, **body):
    found = server.post(path, {"model": "prefix", "temperature": 0, "ignore_eos": True, **body})
    assert found.status_code == status, found.text
    return found.json()


def test_what_is_too_long_behind_a_prefix_is_refused_before_it_waits(server):
    for prompt, new in ((108, 1), (100, 9), (8, 101)):
        found = ask(server, COMPLETE, 400, prompt=[7] * prompt, max_tokens=new)["error"]
        assert found["code"] == "context_length_exceeded"
        assert "prefix of 20" in found["message"] and "108" in found["message"]
    assert server.service.residents.tiers.shown() == [], "it was not even read"
    assert (
        ask(server, COMPLETE, 200, prompt=[7] * 100, max_tokens=8)["usage"]["completion_tokens"]
        == 8
    )
    assert (
        ask(server, COMPLETE, 200, prompt=[7] * 120, max_tokens=8, model=BASE)["usage"][
            "completion_tokens"
        ]
        == 8
    )


def test_an_answer_without_a_limit_ends_where_the_positions_behind_the_prefix_do(server):
    lengths = {}
    for model in (BASE, "tickets", "prefix"):
        usage = ask(server, CHAT, 200, model=model, messages=HELLO)["usage"]
        lengths[model] = usage["total_tokens"]
    assert lengths == {BASE: POSITIONS, "tickets": POSITIONS, "prefix": POSITIONS - PLACES}


def test_a_prefix_takes_whole_blocks_of_the_room_for_keys_and_values(library):
    blocks, front = 5, -(-PLACES // BLOCK_SLOTS)
    with running(
        library, base=made_base(max_position_embeddings=POSITIONS), tokens=blocks * BLOCK_SLOTS
    ) as server:
        room = (blocks - front) * BLOCK_SLOTS
        assert (
            ask(server, COMPLETE, 200, prompt=[7] * 10, max_tokens=room + 1 - 10)["usage"][
                "total_tokens"
            ]
            == room + 1
        )
        found = ask(server, COMPLETE, 400, prompt=[7] * 10, max_tokens=room + 2 - 10)["error"]
        assert found["code"] == "context_length_exceeded"


def test_a_prefix_that_is_to_act_in_part_is_refused_before_it_waits(server):
    found = ask(
        server, CHAT, 400, model=BASE, adapters=[{"name": "prefix", "weight": 0.5}], messages=HELLO
    )
    assert (
        "one adapter with a trained prefix may act, and with weight 1" in found["error"]["message"]
    )


def test_an_answer_may_fill_all_places_and_the_error_names_the_field_to_shorten():
    def most_new(length, max_new):
        return Prompts.most_new([7] * length, max_new, 10, 0)

    assert [most_new(9, None), most_new(9, 1), most_new(1, None), most_new(1, 9)] == [1, 1, 9, 9]
    for length, max_new, field in (
        (10, None, "messages"),
        (10, 0, "messages"),
        (9, 2, "max_tokens"),
    ):
        with pytest.raises(Refusal) as refused:
            most_new(length, max_new)
        assert refused.value.param == field


@pytest.fixture
def tokenised(monkeypatch):
    """The lengths of the texts that are tokenised."""
    lengths = []
    encode_text, encode_marked = PreTrainedTokenizerFast.__call__, TextTokenizer.encode

    def encode_and_count(tokenizer, text, **settings):
        lengths.append(len(text))
        return encode_text(tokenizer, text, **settings)

    def encode_marked_and_count(tokens, texts):
        lengths.extend(len(marked.text) for marked in texts)
        return encode_marked(tokens, texts)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", encode_and_count)
    monkeypatch.setattr(TextTokenizer, "encode", encode_marked_and_count)
    return lengths


MANY_POSITIONS = 50_000
"""Times the longest token these are more characters than the prompts of these tests have."""
LONG = "a b c d " * 50_000


@pytest.mark.parametrize("text", [LONG, "a" * len(LONG), "é" * len(LONG), "\n" * len(LONG)])
@pytest.mark.parametrize("kind", ["text", "chat", "score head"])
def test_a_prompt_that_is_too_long_is_tokenised_only_as_far_as_shows_it(tokenised, kind, text):
    prompts = Prompts(tiny_tokenizer(), positions=MANY_POSITIONS, ids=None)
    if kind == "score head":
        encoding = prompts.examples([text] * 6, NONE, 0, "input")
    else:
        chat = ChatPrompt([{"role": "user", "content": text}])
        prompt = TextPrompt(text=text) if kind == "text" else chat
        encoding = prompts.encoded([prompt] * 6, places=1000)
    with pytest.raises(Refusal, match="is too long") as refused:
        asyncio.run(encoding)
    assert refused.value.code == "context_length_exceeded"
    most = MANY_POSITIONS if kind == "score head" else 1000
    assert sum(tokenised) <= BYTES_PER_TOKEN * most + 2 * PIECE
    prompts.close()


def test_the_prompts_of_a_request_have_one_budget(tokenised, monkeypatch):
    monkeypatch.setattr(prompts_module, "MOST_PROMPT_TOKENS", 5000)
    prompts = Prompts(tiny_tokenizer(), positions=4000, ids=None)
    text = "a b " * 400
    (alone,) = asyncio.run(prompts.encoded([TextPrompt(text=text)], places=4000))
    fitting = 5000 // len(alone)
    several = asyncio.run(prompts.encoded([TextPrompt(text=text)] * fitting, places=4000))
    assert several == [alone] * fitting
    tokenised.clear()
    for prompt in (TextPrompt(text=text), TextPrompt(ids=tuple(alone))):
        with pytest.raises(Refusal, match="more than 5,000 tokens"):
            asyncio.run(prompts.encoded([prompt] * 100, places=4000))
    assert sum(tokenised) <= (fitting + 1) * len(text) + 2 * PIECE
    prompts.close()


@pytest.mark.parametrize("piece", ["a b c ", "é", "<|im_end|>", "  ", "\U0001f600x"])
def test_a_prompt_that_fits_is_never_refused_by_its_pieces(piece):
    """However its tokens fall: special tokens, long runs, several tokens for a character."""
    prompts = Prompts(tiny_tokenizer(), positions=None, ids=None)
    text = piece * 30_000
    (ids,) = asyncio.run(prompts.encoded([TextPrompt(text=text)]))
    budget = TokenBudget(len(ids), len(ids), "prompt")
    budget.check(text, prompts.tokenizer, "the prompt")
    assert prompts.encode(TextPrompt(text=text), NONE, budget) == ids
    with pytest.raises(Refusal):
        budget.take(1, "the prompt")
    prompts.close()


def test_prompts_of_other_requests_are_encoded_between_those_of_one():
    prompts = Prompts(tiny_tokenizer(), positions=None, ids=None)
    ended = []

    async def encode(name, count):
        await prompts.encoded([TextPrompt(text="a")] * count)
        ended.append(name)

    async def both():
        await asyncio.gather(encode("many", 100), encode("one", 1))

    asyncio.run(both())
    assert ended == ["one", "many"]
    prompts.close()


def test_an_answer_without_a_limit_ends_where_the_rotary_frequencies_change(tmp_path):
    """A server that let it go on would refuse each such request."""
    rope = {**ROTARY["longrope"], "original_max_position_embeddings": 96}
    base = made_base("llama", rope_parameters=rope, max_position_embeddings=POSITIONS)
    with running(Library(tmp_path), base=base) as server:
        assert ask(server, CHAT, 200, model=BASE, messages=HELLO)["usage"]["total_tokens"] == 96
        assert server.http().get("/v1/models").json()["data"][0]["max_model_len"] == 96
