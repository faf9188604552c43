"""The step against the model's own forward, one row at a time: losses and gradients, for every
family."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama import modeling_llama

from tests.support.helpers import evaluation_loss, fill, make_examples
from tests.support.models.routed import Routed, batch_loss
from tests.support.tiny import FAMILIES, tiny_model
from veneer.adapters.attach import attach
from veneer.adapters.config import DoRA, LoRA
from veneer.adapters.methods.lora import LoRALayer, low_rank_product
from veneer.adapters.methods.prefix import record_keys
from veneer.adapters.placement.acting import TokenKeys
from veneer.adapters.placement.routing import Routing
from veneer.data.batching import make_batch, packed_rows, plan_epoch, shared_prompt, used_length
from veneer.decoding.continued import logits_of_continuations
from veneer.decoding.schedule.limits import Limits
from veneer.errors import ConfigError
from veneer.kernels.dense import loss as loss_kernel
from veneer.kernels.layout import STEP
from veneer.linear import DenseLinear
from veneer.models import likelihood
from veneer.models import step as step_module
from veneer.models.checkpointing import checkpointed
from veneer.models.step import batch_of, part_nats, prepare, whole_logits

CPU = torch.device("cpu")
UNPACKED = {"bloom": "biases by distance"}
"""Families whose attention does not go through transformers' interface: padded, and the reason says
so."""
FP32 = 1e-5
"""Relative: float32 sums in another order."""


def adapted(family, **settings):
    """A tiny model, its paths, and a LoRA with random values acting; rank and alpha differ."""
    model = tiny_model(family)
    paths, routing = prepare(model), Routing()
    config = LoRA(**{"rank": 3, "alpha": 5.0, **settings})
    attachment = attach(
        model, config, name="a", routing=routing, head=model.get_output_embeddings()
    )
    fill(attachment.parameters().values())
    routing.active = (("a", 1.0),)
    return model, paths, routing, attachment


def loss_and_gradients(model, paths, routing, attachment, examples, *, share=True, parts=1):
    parameters = list(attachment.parameters().values())
    for parameter in parameters:
        parameter.requires_grad_(True).grad = None
    total, loss = float(sum(e.trained.sum() for e in examples)), 0.0
    size = len(examples) // parts
    for start in range(0, len(examples), size):
        batch = make_batch(
            examples[start : start + size],
            packed=paths.packed,
            share_prompt=share,
            device=CPU,
            invocation=attachment.invocation,
        )
        part = batch_loss(Routed(model, paths, routing), batch, total=total)
        part.backward()
        loss += part.item()
    return loss, [p.grad.clone() for p in parameters]


def own_loss_and_gradients(model, attachment, examples):
    """The plain reference: every row alone through the model's own forward and head, under torch's
    autograd."""
    parameters = list(attachment.parameters().values())
    for parameter in parameters:
        parameter.requires_grad_(True).grad = None
    total = sum(e.trained.sum() for e in examples)
    nats = 0.0
    for example in examples:
        ids = torch.from_numpy(example.ids.astype(np.int64))[None]
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[
            0
        ]
        rows = np.flatnonzero(example.trained)
        nats = nats + F.cross_entropy(logits[rows - 1], ids[0, rows], reduction="sum")
    (nats / total).backward()
    return (nats / total).item(), [p.grad.clone() for p in parameters]


def assert_same(one, other, tolerance=FP32):
    assert one[0] == pytest.approx(other[0], rel=tolerance)
    for ours, theirs in zip(one[1], other[1], strict=True):
        assert theirs.abs().max() > 0
        difference = (ours - theirs).abs().max() / theirs.abs().max()
        assert difference < 20 * tolerance


@pytest.mark.parametrize("family", [*FAMILIES, "stablelm"])
def test_the_step_gives_the_models_own_loss_and_gradients(family):
    model, paths, routing, attachment = adapted(family)
    assert paths.packed == (family not in UNPACKED), paths.packed_reason
    assert family not in UNPACKED or UNPACKED[family] in paths.packed_reason
    assert paths.head_reason is None
    examples = make_examples(4)
    reference = own_loss_and_gradients(model, attachment, examples)
    for share in (True, False):
        assert_same(
            loss_and_gradients(model, paths, routing, attachment, examples, share=share), reference
        )


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma2", "bloom"])
def test_accumulation_is_token_exact_on_ragged_rows(family):
    model, paths, routing, attachment = adapted(family)
    examples = make_examples(8)
    whole = loss_and_gradients(model, paths, routing, attachment, examples)
    for parts in (2, 8):
        assert_same(
            loss_and_gradients(model, paths, routing, attachment, examples, parts=parts), whole
        )


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gemma3", "opt", "qwen3_moe", "bloom", "stablelm"]
)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_checkpointing_changes_no_bit(family, dropout):
    model, paths, routing, attachment = adapted(family, dropout=dropout)
    examples = make_examples(4)

    def run(on):
        batch = make_batch(examples, packed=paths.packed, share_prompt=True, device=CPU)
        with checkpointed(model, routing, on=on), routing.drawing(TokenKeys(batch.dropout_rows, 3)):
            for parameter in attachment.parameters().values():
                parameter.requires_grad_(True).grad = None
            loss = batch_loss(Routed(model, paths, routing), batch, total=7.0)
            loss.backward()
            return loss, [p.grad for p in attachment.parameters().values()]

    (kept, gradients), (again, same) = run(False), run(True)
    assert torch.equal(kept, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, same, strict=True))


def test_checkpointed_layers_are_computed_again_as_they_were_on_whatever_thread_that_happens():
    model, paths, routing, attachment = adapted("llama", dropout=0.25)
    batch = make_batch(make_examples(4), packed=paths.packed, share_prompt=True, device=CPU)

    def run(behind):
        for parameter in attachment.parameters().values():
            parameter.requires_grad_(True).grad = None
        with checkpointed(model, routing, on=True):
            with routing.drawing(TokenKeys(batch.dropout_rows, 3)):
                loss = batch_loss(Routed(model, paths, routing), batch, total=7.0)
                if not behind:
                    loss.backward()
            if behind:  # by now nothing drops out any more here, and there nothing ever did
                thread = threading.Thread(target=loss.backward)
                thread.start()
                thread.join()
        return [p.grad for p in attachment.parameters().values()]

    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True), strict=True))


DROPPED = {
    "layers": ("llama", {}),
    "head": ("llama", {"targets": ["lm_head", "down_proj"]}),
    "experts": ("qwen3_moe", {"targets": ["gate_up_proj", "down_proj"]}),
}


@pytest.mark.parametrize("case", DROPPED)
def test_dropout_acts_in_training_only_and_does_not_depend_on_the_batch(case, monkeypatch):
    monkeypatch.setattr(loss_kernel, "CHUNK", 5)  # the head sees its rows in parts
    family, settings = DROPPED[case]
    model, paths, routing, attachment = adapted(family, dropout=0.4, **settings)
    examples = make_examples(4)
    without = loss_and_gradients(model, paths, routing, attachment, examples, share=False)[0]

    def loss_of(rows, step=0):
        batch = make_batch(rows, packed=True, share_prompt=True, device=CPU)
        with routing.drawing(TokenKeys(batch.dropout_rows, step)):
            return batch_loss(Routed(model, paths, routing), batch, total=1.0).item()

    together = loss_of(examples)
    total = sum(e.trained.sum() for e in examples)
    assert together / total != pytest.approx(without, rel=1e-3)
    assert together == pytest.approx(sum(loss_of([e]) for e in reversed(examples)), rel=FP32)
    assert loss_of(examples, step=1) != pytest.approx(together, rel=1e-4)


@pytest.mark.parametrize("case", [*DROPPED, "dora"])
def test_adapters_that_train_together_keep_their_dropout(case):
    family, settings = DROPPED.get(case, ("llama", {}))
    model, routing = tiny_model(family), Routing()
    paths, head = prepare(model), model.get_output_embeddings()
    method = DoRA if case == "dora" else LoRA
    for number, name in enumerate("ab"):
        config = method(rank=3, alpha=5.0, dropout=0.5, **settings)
        fill(
            attach(model, config, name=name, routing=routing, head=head).parameters().values(),
            seed=number,
        )
    routing.active = (("a", 1.0), ("b", -0.5))
    batch = make_batch(make_examples(4), packed=True, share_prompt=True, device=CPU)
    plain = batch_loss(Routed(model, paths, routing), batch, total=1.0).item()
    with routing.drawing(TokenKeys(batch.dropout_rows, 0)):
        assert batch_loss(Routed(model, paths, routing), batch, total=1.0).item() != pytest.approx(
            plain, rel=1e-3
        )


def test_lora_layers_that_act_together_each_see_the_inputs_through_a_mask_of_their_own():
    torch.manual_seed(0)
    base, x, rows = DenseLinear(nn.Linear(6, 5)), torch.randn(7, 6), torch.arange(7) * 977
    acting = [
        (
            LoRALayer(
                "linear",
                torch.randn(2, 6),
                torch.randn(5, 2),
                alpha=3.0,
                rslora=False,
                dropout=share,
            ),
            weight,
            keys,
        )
        for share, weight, keys in (
            (0.5, 1.0, TokenKeys(rows, 3)),
            (0.5, -2.0, TokenKeys(rows, 3, number=1)),
            (0.0, 0.5, TokenKeys(rows, 3, number=2)),
        )
    ]
    seen = [layer.active_dropout(x, keys) for layer, _, keys in acting]
    masks = [drop.apply_reference(x) == 0 for drop in seen[:2]]
    assert not torch.equal(*masks) and seen[2] is None
    expected = base.module(x)
    for (layer, weight, _), drop in zip(acting, seen, strict=True):
        given = x if drop is None else drop.apply_reference(x)
        expected = expected + weight * layer.scaling * given @ layer.A.T @ layer.B.T
    found = low_rank_product(x, base.own_bias(), base, acting)
    parameters = [parameter for layer, _, _ in acting for parameter in layer.parts().values()]
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_dropout_over_a_module_that_sees_other_rows_than_the_batch_is_an_error():
    layer = LoRALayer(
        "linear", torch.zeros(2, 4), torch.zeros(3, 2), alpha=1.0, rslora=False, dropout=0.5
    )
    with pytest.raises(ConfigError, match="gets 3 rows, the batch has 5"):
        layer.active_dropout(torch.zeros(3, 4), TokenKeys(torch.arange(5), 0))


def test_full_training_gives_every_weight_the_gradient_of_the_models_own_forward():
    model = tiny_model("llama")
    paths = prepare(model)
    examples = make_examples(4)
    model.requires_grad_(True)

    class Whole:
        invocation = ()

        def parameters(self):
            return dict(model.named_parameters())

    ours = loss_and_gradients(model, paths, Routing(), Whole(), examples)
    assert_same(ours, own_loss_and_gradients(model, Whole(), examples))


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_evaluation_is_weighted_by_token_and_does_not_depend_on_the_batch(family):
    model, paths, routing, _ = adapted(family)
    examples = make_examples(7)
    nats, tokens = evaluation_loss(model, paths, routing, examples, batch=7)
    assert tokens == sum(e.trained.sum() for e in examples)
    assert evaluation_loss(model, paths, routing, examples, batch=2)[0] == pytest.approx(
        nats, rel=FP32
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma2", "falcon"])
@pytest.mark.parametrize("head", [False, True])
def test_the_nats_of_each_example_are_those_that_it_has_alone(family, head):
    model, paths, routing, _ = adapted(family, **({"targets": ["lm_head"]} if head else {}))
    examples, parts = make_examples(7), [[0, 3, 2], [1], [6, 4, 5]]
    found = part_nats(Routed(model, paths, routing), examples, parts)
    assert (
        list(map(len, found)) == [3, 1, 3]
        and part_nats(Routed(model, paths, routing), examples, []) == []
    )
    for part, nats in zip(parts, found, strict=True):
        alone = [evaluation_loss(model, paths, routing, [examples[i]], batch=1)[0] for i in part]
        assert nats == pytest.approx(alone, rel=FP32)
        batch = batch_of(Routed(model, paths), examples, part, share_prompt=True)
        with torch.no_grad():
            assert sum(nats) == pytest.approx(
                batch_loss(Routed(model, paths, routing), batch, total=1.0).item(), rel=FP32
            )


def test_the_shared_prompt_ends_before_the_row_that_predicts_the_first_trained_token():
    examples = make_examples(5, prompt=9)
    assert shared_prompt(examples) == 9
    early = make_examples(5, prompt=9)
    early[2].trained[4] = True
    assert shared_prompt(early) == 3
    assert shared_prompt(examples[:1]) == 0


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_rows_of_a_batch_are_known_before_it_is_made(count, share):
    examples = make_examples(count, prompt=40, longest=90, seed=count)
    batch = make_batch(examples, packed=True, share_prompt=share, device=CPU)
    assert packed_rows(examples, share_prompt=share) == batch.computed_tokens


def test_what_no_loss_depends_on_is_not_computed():
    example = make_examples(1)[0]
    last = int(np.flatnonzero(example.trained)[-1])
    assert used_length(example) == last
    batch = make_batch([example], packed=True, share_prompt=True, device=CPU)
    assert batch.layout.rows == last
    assert last <= batch.computed_tokens < last + STEP
    assert batch.tokens == len(example.ids)


@pytest.mark.parametrize("order", ["bucketed", "shuffled", "file"])
def test_every_row_comes_once_an_epoch_in_an_order_that_seed_and_epoch_alone_decide(order):
    lengths = np.random.default_rng(0).integers(5, 90, 101).tolist()
    plan = [*plan_epoch(lengths, batch=8, seed=3, epoch=1, order=order)]
    assert sorted(i for rows in plan for i in rows) == list(range(101))
    assert sorted(len(rows) for rows in plan) == [5] + [8] * 12
    assert plan == [*plan_epoch(lengths, batch=8, seed=3, epoch=1, order=order)]
    if order != "file":
        assert plan != [*plan_epoch(lengths, batch=8, seed=3, epoch=2, order=order)]
        assert plan != [*plan_epoch(lengths, batch=8, seed=4, epoch=1, order=order)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_whole_logits_are_the_slower_road_to_the_same_loss_and_gradients(family):
    model, paths, routing, attachment = adapted(family)
    examples = make_examples(4)
    fast = loss_and_gradients(model, paths, routing, attachment, examples)
    slower = replace(paths, head_reason="a head of an unknown kind")
    assert_same(loss_and_gradients(model, slower, routing, attachment, examples), fast)


def test_an_adapted_head_trains_through_the_chunked_loss():
    model, paths, routing, attachment = adapted("llama_untied", targets=["lm_head", "q_proj"])
    examples = make_examples(4)
    ours = loss_and_gradients(model, paths, routing, attachment, examples)
    assert_same(ours, own_loss_and_gradients(model, attachment, examples))


def test_the_screen_says_which_road_rows_and_logits_take():
    paths = prepare(tiny_model("llama"))
    assert paths.lines == [
        "packed rows, attention per document",
        "logits only where a token is trained, in chunks",
    ]
    padded = replace(paths, packed=False, packed_reason="P", head_reason="H")
    assert padded.lines == ["padded rows: P", "whole logits: H"]
    alone = replace(padded, padded_reason="Q")
    assert alone.lines[0] == "rows one by one: P; Q"
    examples = make_examples(3)
    assert alone.together(examples, 0) == [[0], [1], [2]]
    for together in (paths, padded, replace(paths, padded_reason="Q")):
        assert together.together(examples, 0) == [[0, 1, 2]]


def test_no_cache_is_filled_where_nobody_reads_one(monkeypatch):
    model = tiny_model("llama")
    paths = prepare(model)
    batch = make_batch(make_examples(3), packed=paths.packed, share_prompt=True, device=CPU)
    monkeypatch.setattr(
        modeling_llama, "DynamicCache", lambda *a, **k: pytest.fail("a cache was made")
    )
    whole_logits(model, batch)
    logits_of_continuations(model, [[1, 2, 3], [1, 2, 4]], [[5], [6]], Limits())
    record_keys(model.model, torch.arange(5))


def test_a_text_is_continued_alone_as_the_model_reads_it():
    model, text = tiny_model("llama"), [*range(3, 43)]
    prepare(model)
    (found,) = logits_of_continuations(model, [text[:20]], [text[20:]], Limits())
    with torch.no_grad():
        torch.testing.assert_close(
            found, model(torch.tensor([text])).logits[0, 19:], rtol=1e-4, atol=1e-4
        )


def test_evaluation_computes_a_prompt_that_rows_share_once(monkeypatch):
    model, asked = tiny_model("llama"), []
    monkeypatch.setattr(
        step_module,
        "make_batch",
        lambda rows, **more: asked.append(make_batch(rows, **more)) or asked[-1],
    )
    paths, examples = prepare(model), make_examples(4)
    asked.clear()
    evaluation_loss(model, paths, Routing(), examples, batch=4)
    likelihood.example_nats(Routed(model, paths), examples, batch=4)
    assert len(asked) == 2
    for batch in asked:
        assert batch.computed_tokens < sum(len(e.ids) - 1 for e in examples)
