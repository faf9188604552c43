"""A prefix against transformers' own forward with a cache that holds it, in every way that Veneer
runs a model."""

import pytest
import torch
from transformers import DynamicCache

from tests.models.test_step import assert_same, loss_and_gradients
from tests.support.helpers import fill, make_examples
from tests.support.models.routed import Routed, batch_loss
from tests.support.tiny import (
    FAMILIES,
    MAX_POSITIONS,
    SLIDING_WINDOW,
    save_tiny,
    tiny_base,
    tiny_model,
)
from veneer.adapters.attach import attach, detach
from veneer.adapters.config import LoRA, Prefix
from veneer.adapters.methods.prefix import decoder_of
from veneer.adapters.methods.prefix_layer import PrefixKeys, PrefixLayer
from veneer.adapters.placement.routing import Routing
from veneer.data.batching import make_batch
from veneer.decoding.generate import generate
from veneer.errors import ConfigError
from veneer.execution.attention import attention_forward
from veneer.models.checkpointing import checkpointed
from veneer.models.load import load_base
from veneer.models.starts.initial_values import begin
from veneer.models.starts.prefix import INSTRUCTION, choose_values
from veneer.models.step import prepare

pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
CPU = torch.device("cpu")
UNREACHED = ("bloom", "falcon")
"""Families whose attention is their own: no prefix reaches it."""
REACHED = tuple(family for family in FAMILIES if family not in UNREACHED)
IDS = torch.tensor(
    [[5, 9, 30, 7, 5, 61, 2, 8, 44, 10, 11, 12], [3, 9, 1, 7, 5, 6, 2, 8, 4, 100, 110, 120]]
)
FP32 = 1e-5


def put(model, routing, name="a", **settings):
    """A prefix of five tokens with random values, acting; the model's packed attention is switched
    on."""
    prepare(model)
    config = Prefix(**{"tokens": 5, "start": "random", **settings})
    head = model.get_output_embeddings()
    attachment = attach(model, config, name=name, routing=routing, head=head)
    fill(attachment.parameters().values(), scale=1.0)
    routing.active = ((name, 1.0),)
    return attachment


def layer_of(attachment) -> PrefixLayer:
    (layer,) = attachment.layers.values()
    return layer


def logits(model, ids=IDS, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **inputs).logits


def own_logits(model, layer, ids=IDS):
    """transformers' forward with a cache that holds the prefix: what PEFT runs. The model carries
    no wrapper."""
    cache = DynamicCache(config=model.config)
    for number, pair in layer.keys().items():
        key, value = (t.detach().transpose(0, 1).expand(ids.shape[0], -1, -1, -1) for t in pair)
        cache.update(key, value, number)
    positions = torch.arange(layer.tokens, layer.tokens + ids.shape[1])[None]
    mask = torch.ones(ids.shape[0], layer.tokens + ids.shape[1], dtype=torch.long)
    with torch.no_grad():
        own = {"past_key_values": cache, "position_ids": positions, "attention_mask": mask}
        return model(input_ids=ids, **own).logits


@pytest.mark.parametrize("family", REACHED)
def test_a_prefix_is_what_transformers_computes_with_it_in_the_cache(family):
    model, routing = tiny_model(family), Routing()
    expected = own_logits(tiny_model(family), layer_of(put(model, routing)))
    difference = (logits(model) - expected).abs().max() / expected.abs().max()
    assert difference < FP32


@pytest.mark.parametrize("family", REACHED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prefix_changes_no_bit_until_it_acts_and_leaves_no_trace(family, dtype):
    model, routing = tiny_model(family, dtype), Routing()
    prepare(model)
    names, before = list(dict(model.named_parameters())), logits(model)
    put(model, routing)
    assert not torch.allclose(logits(model), before, rtol=1e-2)
    routing.active = ()
    assert torch.equal(logits(model), before)
    detach(model, "a", routing=routing)
    assert list(dict(model.named_parameters())) == names
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", REACHED)
def test_the_step_gives_the_loss_and_gradients_of_rows_one_by_one(family):
    model, routing = tiny_model(family), Routing()
    attachment, paths = put(model, routing), prepare(model)
    examples = make_examples(4)
    own = own_loss_and_gradients(model, attachment, examples)
    for share in (True, False):
        assert_same(
            loss_and_gradients(model, paths, routing, attachment, examples, share=share), own
        )


def own_loss_and_gradients(model, attachment, examples):
    """Every row alone, unpacked, through transformers' own attention and autograd."""
    from tests.models.test_step import own_loss_and_gradients as reference

    return reference(model, attachment, examples)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
@pytest.mark.parametrize("projection", [None, 7])
def test_checkpointing_changes_no_bit(family, projection):
    model, routing = tiny_model(family), Routing()
    attachment, paths = put(model, routing, projection=projection), prepare(model)
    batch = make_batch(make_examples(4), packed=paths.packed, share_prompt=True, device=CPU)

    def run(on):
        with checkpointed(model, routing, on=on):
            for parameter in attachment.parameters().values():
                parameter.requires_grad_(True).grad = None
            loss = batch_loss(Routed(model, paths, routing), batch, total=7.0)
            loss.backward()
            return loss, [p.grad.clone() for p in attachment.parameters().values()]

    (kept, gradients), (again, same) = run(False), run(True)
    assert torch.equal(kept, again)
    assert all(
        torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(gradients, same, strict=True)
    )


def test_padded_rows_give_what_packed_rows_give():
    model, routing = tiny_model("gemma2"), Routing()
    attachment, paths = put(model, routing), prepare(model)
    examples = make_examples(5)
    packed = loss_and_gradients(model, paths, routing, attachment, examples)
    parameters = list(attachment.parameters().values())
    for parameter in parameters:
        parameter.grad = None
    batch = make_batch(examples, packed=False, share_prompt=False, device=CPU)
    loss = batch_loss(Routed(model, paths, routing), batch, total=float(batch.trained_tokens))
    loss.backward()
    assert_same((loss.item(), [p.grad for p in parameters]), packed)


def test_padded_rows_with_different_prefixes_give_what_each_gives_alone():
    module, draw = torch.nn.Module().eval(), torch.Generator().manual_seed(1)
    module.layer_idx, module.is_causal = 0, True
    query, key, value = (torch.randn(4, 2, 6, 8, generator=draw) for _ in range(3))
    mask = torch.ones(4, 1, 6, 6, dtype=torch.bool).tril()
    mask[2, :, 1:, 0] = False
    prefixes = [{0: (torch.randn(M, 2, 8, generator=draw),) * 2} if M else {} for M in (3, 0, 5)]
    rows = [slice(0, 1), slice(1, 2), slice(2, 4)]
    positions = torch.arange(6) + torch.tensor([[3], [0], [4], [5]])

    def attend(rows, parts):
        prefix = PrefixKeys(parts, positions[rows])
        inputs = query[rows], key[rows], value[rows], mask[rows]
        return attention_forward(module, *inputs, sliding_window=7, veneer_prefix=prefix)[0]

    tokens = [slice(6 * part.start, 6 * part.stop) for part in rows]
    together = attend(slice(None), list(zip(tokens, prefixes, strict=True)))
    alone = [
        attend(part, [(slice(None), pairs)]) for part, pairs in zip(rows, prefixes, strict=True)
    ]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("layers", [[0], [1]])
def test_a_prefix_of_some_layers_leaves_the_others_alone(layers):
    model, routing = tiny_model("llama"), Routing()
    layer = layer_of(put(model, routing, layers=layers))
    assert list(layer.keys()) == layers
    some = logits(model)
    detach(model, "a", routing=routing)
    whole = layer_of(put(model, routing))
    assert not torch.allclose(logits(model), some, rtol=1e-2)
    with (
        torch.no_grad()
    ):  # a value of zero behind a key that no query likes gives what no prefix gives
        slices = whole.start.view(whole.tokens, 4, -1)
        slices[:, 2 * layers[0] : 2 * layers[0] + 2] = layer.start.view(layer.tokens, 2, -1)
    other = 1 - layers[0]
    keys = whole.keys()
    whole.keys = lambda: {n: pair for n, pair in keys.items() if n != other}
    torch.testing.assert_close(logits(model), some)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral", "opt"])
def test_greedy_answers_of_a_padded_batch_are_those_of_whole_forwards(family):
    base = tiny_base(
        family, tie_word_embeddings=False
    )  # tied, they repeat the last token whatever comes before
    prepare(base.model)
    attachment = begin(base, Prefix(tokens=6, start="random"), name="a").attachment
    fill(attachment.parameters().values(), scale=1.0)
    prompts = [[5, 9, 30, 7], [61, 2, 8, 44, 10, 11, 12, 90, 5, 4, SLIDING_WINDOW], [1, 2]]
    plain = generate(base, prompts, max_new_tokens=8)
    base.routing.active = (("a", 1.0),)
    answers = generate(base, prompts, max_new_tokens=8)
    assert answers != plain
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = list(prompt)
        for token in answer:
            assert logits(base.model, torch.tensor([ids]))[0, -1].argmax() == token
            ids.append(token)


@pytest.mark.parametrize("quantize", ["nf4", None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_over_a_quantised_base_it_trains_as_over_the_same_weights_in_the_open(
    quantize, dtype, tmp_path
):
    base = load_base(
        str(save_tiny(tmp_path / "base", hidden_size=64)), dtype=dtype, quantize=quantize
    )
    attachment = begin(base, Prefix(prompt="Count."), name="a").attachment
    base.routing.active = (("a", 1.0),)
    examples = make_examples(4)
    loss, gradients = loss_and_gradients(base.model, base.paths, base.routing, attachment, examples)
    own, theirs = own_loss_and_gradients(base.model, attachment, examples)
    tolerance = 1e-5 if dtype == "float32" else 2e-2  # bf16 rounds every layer's output to 8 bits
    assert loss == pytest.approx(own, rel=tolerance)
    for ours, reference in zip(gradients, theirs, strict=True):
        assert reference.norm() > 0
        assert (ours - reference).norm() / reference.norm() < 20 * tolerance


def test_a_prefix_and_lora_act_together():
    model, routing = tiny_model("llama"), Routing()
    lora = attach(
        model,
        LoRA(rank=3, alpha=5.0),
        name="l",
        routing=routing,
        head=model.get_output_embeddings(),
    )
    fill(lora.parameters().values())
    prefix = put(model, routing, name="p")
    only_prefix = logits(model)
    routing.active = (("l", 1.0), ("p", 1.0))
    both = logits(model)
    assert not torch.allclose(both, only_prefix, rtol=1e-2)
    detach(model, "p", routing=routing)
    routing.active = (("l", 1.0),)
    cached = own_logits(model, layer_of(prefix))
    torch.testing.assert_close(both, cached, rtol=1e-4, atol=1e-4)
    after = attach(
        model, LoRA(rank=2), name="m", routing=routing, head=model.get_output_embeddings()
    )
    assert list(after.layers) == list(lora.layers)


def test_two_prefixes_or_half_of_one_are_refused():
    model, routing = tiny_model("llama"), Routing()
    put(model, routing, name="a")
    put(model, routing, name="b")
    for active in ((("a", 1.0), ("b", 1.0)), (("a", 0.5),)):
        with pytest.raises(
            ConfigError, match="one adapter with a trained prefix may act, and with weight 1"
        ):
            routing.active = active


@pytest.mark.parametrize("family", UNREACHED)
def test_a_model_that_a_prefix_cannot_reach_is_refused_by_name_and_left_as_it_was(family):
    model = tiny_model(family)
    names = list(dict(model.named_modules()))
    with pytest.raises(ConfigError, match="prefix tuning does not work on") as caught:
        put(model, Routing())
    assert family.capitalize() in str(caught.value)
    assert list(dict(model.named_modules())) == names


def test_layers_that_do_not_exist_are_named():
    with pytest.raises(ConfigError, match="layers 0-1"):
        put(tiny_model("llama"), Routing(), layers=[0, 7])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_prefix_started_from_a_prompt_is_the_prompt(family):
    base = tiny_base(family)
    prepare(base.model)
    begin(base, Prefix(prompt="Answer in one word."), name="a")
    ids = torch.tensor([base.tokenizer("Answer in one word.")["input_ids"]])
    whole = logits(base.model, torch.cat([ids, IDS[:1]], dim=1))[:, ids.shape[1] :]
    base.routing.active = (("a", 1.0),)
    torch.testing.assert_close(logits(base.model, IDS[:1]), whole, rtol=1e-4, atol=1e-4)


def test_what_a_prefix_starts_from():
    base, examples = tiny_base(), make_examples(4, prompt=12)
    start = choose_values(Prefix(), base, examples)
    assert start.ids == examples[0].ids[:12].tolist()
    assert start.tokens == 12
    assert "common beginning of all rows" in start.line
    assert choose_values(Prefix(tokens=5), base, examples).ids == examples[0].ids[7:12].tolist()
    longer = choose_values(Prefix(tokens=15), base, examples).ids
    assert longer == [*start.ids, *start.ids[:3]]
    few = choose_values(Prefix(), base, make_examples(4, prompt=3))
    assert base.tokenizer.decode(few.ids) == INSTRUCTION[-64:]  # a byte a token
    assert choose_values(Prefix(start="random"), base, examples).tokens == 30
    assert choose_values(Prefix(prompt="Say yes."), base, examples).tokens == 8


def test_a_row_that_finds_no_place_behind_the_prefix_is_refused():
    base, examples = tiny_base(), make_examples(3, longest=40)
    prepare(base.model)
    with pytest.raises(ConfigError, match=r"40 tokens: with 1000 .* 1024 positions"):
        begin(base, Prefix(tokens=1000, start="random"), name="a", examples=examples)
    begin(base, Prefix(tokens=20, start="random"), name="a")
    base.routing.active = (("a", 1.0),)
    with pytest.raises(ConfigError, match=f"{MAX_POSITIONS - 20:,} positions"):
        generate(base, [[1] * (MAX_POSITIONS - 20)], max_new_tokens=1)
    (answer,) = generate(base, [[1] * (MAX_POSITIONS - 24)], max_new_tokens=50)
    assert len(answer) <= 4


@pytest.mark.parametrize("start", ["prompt", "random"])
def test_a_projection_starts_where_a_plain_prefix_starts_and_stores_what_it_computes(start):
    base = tiny_base("qwen3")
    prepare(base.model)
    with_mlp = begin(base, Prefix(start=start, tokens=6, projection=7), name="a").attachment
    plain = begin(base, Prefix(start=start, tokens=6), name="b").attachment
    one, other = layer_of(with_mlp), layer_of(plain)
    t, h, out = 2 * 12, 7, 2 * 2 * 2 * 12
    assert with_mlp.num_parameters() == 6 * t + (t * h + h) + (h * out + out)
    assert plain.num_parameters() == 6 * out
    if start == "prompt":
        assert torch.equal(one.values(), other.values())
    fill(with_mlp.parameters().values())
    base.routing.active = (("a", 1.0),)
    computed = logits(base.model)
    with torch.no_grad():
        other.start.copy_(one.stored()["prompt_embeddings"])
    base.routing.active = (("b", 1.0),)
    assert torch.equal(logits(base.model), computed)


def test_the_decoder_is_found_with_its_wrapper_and_without():
    model = tiny_model("opt")
    path, plain = decoder_of(model)
    put(model, Routing())
    assert decoder_of(model) == (path, plain)
    assert path == "model.decoder"
