"""Our engine against transformers' own loop, family by family; rows that come, stop and go."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from tests.support.helpers import fill, filled_lora
from tests.support.tiny import FAMILIES, SLIDING_WINDOW, tiny_base, tiny_model
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.decoding import generate as answers
from veneer.decoding.continued import logits_of_continuations
from veneer.decoding.forward import PagedForward
from veneer.decoding.generate import generate
from veneer.decoding.proof import PackedDecoding, decodes_packed, prove_decoding
from veneer.decoding.schedule.limits import Limits
from veneer.errors import ConfigError, DivergedError
from veneer.kernels.dense.segments import UpdateCache
from veneer.model_record import record_of

PADDED = {"bloom"}  # does not go through the attention interface
EOS = 257  # transformers stops there whatever it is told
NEW = 24  # more than the sliding window, so that the window moves
PROMPTS = [[(7 * i + j * j) % 250 for j in range(3 + 5 * i)] for i in range(5)]  # 3 to 23 tokens
SHARED = [[9, 8, 7, 6, 5, 4, 3, 2, 1, 0] * 2 + own for own in PROMPTS]


def reference(model, prompts, stops, new=NEW):
    """transformers' greedy, one prompt at a time."""
    answers = []
    for prompt in prompts:
        settings = GenerationConfig(
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=sorted(stops) or None,
            pad_token_id=258,
        )
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            generation_config=settings,
        )
        answers.append(until(stops, out[0, len(prompt) :].tolist()))
    return answers


def until(stops, ids):
    """The ids before the first stop: what a greedy answer is that stops there."""
    return next((ids[:at] for at, token in enumerate(ids) if token in stops), ids)


def ours(base, prompts, stops=frozenset(), new=NEW):
    """By the engine, which is proven."""
    base.model.generation_config.eos_token_id = sorted({EOS, *stops})
    found = generate(base, prompts, max_new_tokens=new)
    assert decodes_packed(base)
    return found


@pytest.mark.parametrize("family", [*(f for f in FAMILIES if f not in PADDED), "stablelm"])
def test_answers_are_those_of_transformers(family):
    """Prompts that share nothing, and a start."""
    base = tiny_base(family)
    for prompts in (PROMPTS, SHARED):
        free = reference(base.model, prompts, {EOS})
        stops = {
            EOS,
            *(answer[5] for answer in free[1:4:2] if len(answer) > 5),
        }  # rows stop at different steps
        expected = [until(stops, answer) for answer in free]
        assert ours(base, prompts, stops) == expected
        assert len({len(answer) for answer in expected}) > 1
    assert NEW > SLIDING_WINDOW


@pytest.mark.parametrize("family", sorted(PADDED))
def test_what_cannot_be_packed_is_told_and_left_to_transformers(family):
    base = tiny_base(family)
    assert prove_decoding(base.model) is not None
    assert generate(base, PROMPTS, max_new_tokens=4) == reference(base.model, PROMPTS, {257}, 4)
    assert not decodes_packed(base)


def test_answers_do_not_depend_on_how_many_rows_go_together(monkeypatch):
    """Few rows: waiting prompts are read while others are being answered."""
    base = tiny_base("llama_untied")
    prompts = [[(i * 31 + j) % 250 for j in range(2 + i * 7 % 40)] for i in range(9)]
    free = reference(base.model, prompts, {EOS})
    stops = {EOS, *(answer[3 + i % 5] for i, answer in enumerate(free[:4]) if len(answer) > 8)}
    expected = [until(stops, answer) for answer in free]
    for rows in (1, 2, 3, 64):
        monkeypatch.setattr(answers, "ROWS", rows)
        assert ours(base, prompts, stops) == expected


@pytest.mark.parametrize(("name", "few"), [("READ_TOKENS", 64), ("KEYS_TOKENS", 96)])
def test_long_prompts_are_read_in_parts_and_few_blocks_let_few_answers_go_together(
    monkeypatch, name, few
):
    base = tiny_base("qwen3")
    expected = reference(base.model, SHARED, {EOS}, 5)
    monkeypatch.setattr(answers, name, few)
    assert ours(base, SHARED, new=5) == expected


def test_an_answer_may_be_longer_than_all_that_is_held_of_several(monkeypatch):
    base = tiny_base("llama")
    expected = reference(base.model, PROMPTS[:2], {EOS}, 90)
    monkeypatch.setattr(answers, "KEYS_TOKENS", 32)
    assert ours(base, PROMPTS[:2], new=90) == expected


def test_one_long_prompt_does_not_keep_short_ones_apart(monkeypatch):
    base, steps, right = tiny_base("llama"), [], PagedForward.rows
    assert decodes_packed(base)
    monkeypatch.setattr(
        PagedForward, "rows", lambda self, plan: steps.append(plan) or right(self, plan)
    )
    ours(base, [[5] * 400, *PROMPTS], new=4)
    assert len(steps) <= 5


def test_a_step_gives_the_logits_of_the_whole_text():
    """Read in chunks beside others that go on, the second and the third from what the first has
    read."""
    model = tiny_model("gemma2", torch.float64)
    prove_decoding(model)
    whole = [model(input_ids=torch.tensor([p]), use_cache=False).logits[0] for p in SHARED]
    found = logits_of_continuations(
        model,
        [p[:-2] for p in SHARED],
        [p[-2:] for p in SHARED],
        Limits(rows=3, step_tokens=13, chunk_tokens=9),
    )
    close = {"rtol": 1e-4, "atol": 1e-5}  # rotary angles and norms are float32 in the model itself
    for own, of in zip(found, whole, strict=True):
        torch.testing.assert_close(own, of[-3:], **close)


def test_a_model_that_answers_differently_packed_is_found_out(monkeypatch):
    model, right = tiny_model("llama"), PagedForward.logits
    monkeypatch.setattr(PagedForward, "logits", lambda *given: right(*given) + 1.0)
    assert "differs" in str(prove_decoding(model))
    monkeypatch.setattr(PagedForward, "logits", lambda *given: right(*given) * float("nan"))
    assert "differs" in str(prove_decoding(model))


def test_rows_that_stopped_are_not_computed(monkeypatch):
    base, computed, right = tiny_base("llama"), [], PagedForward.rows
    free = reference(base.model, PROMPTS, {EOS})
    stop = next(token for token in free[1] if sum(token in answer for answer in free) >= 3)
    assert decodes_packed(base)
    monkeypatch.setattr(
        PagedForward, "rows", lambda self, plan: computed.append(plan) or right(self, plan)
    )
    found = ours(base, PROMPTS * 4, {stop})
    read = sum(map(len, PROMPTS * 4))
    most = sum(min(len(answer), NEW - 1) for answer in found)
    assert sum(span.stop - span.start for plan in computed for span in plan.spans) <= read + most


def test_logits_that_are_no_numbers_are_no_answer():
    base = tiny_base("llama")
    assert decodes_packed(base)
    base.model.get_output_embeddings().weight.data[:] = float("nan")
    with pytest.raises(DivergedError, match="not finite"):
        generate(base, PROMPTS, max_new_tokens=3)


def test_sampling_is_reproducible_and_a_row_does_not_depend_on_its_neighbours():
    base = tiny_base("llama")
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    together = generate(base, PROMPTS, **options)
    assert together == generate(base, PROMPTS, **options)
    assert generate(base, PROMPTS[:1], **options)[0] == together[0]
    assert generate(base, PROMPTS, **{**options, "seed": 4}) != together


def test_sampling_follows_the_models_probabilities():
    base = tiny_base("llama", initializer_range=0.05)
    prompt = PROMPTS[3]
    drawn = [
        ids[0] for ids in generate(base, [prompt] * 4000, max_new_tokens=1, temperature=0.7) if ids
    ]
    logits = base.model(input_ids=torch.tensor([prompt])).logits[0, -1]
    expected = torch.softmax(logits / 0.7, dim=-1)
    top = expected.topk(5)
    for token, chance in zip(top.indices.tolist(), top.values.tolist(), strict=True):
        assert abs(drawn.count(token) / 4000 - chance) < 4 * (chance * (1 - chance) / 4000) ** 0.5


def test_a_small_top_p_is_greedy():
    base = tiny_base("llama")
    greedy = generate(base, PROMPTS, max_new_tokens=8)
    assert generate(base, PROMPTS, max_new_tokens=8, temperature=1.0, top_p=1e-6) == greedy


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_where_nothing_is_left_to_draw_from_the_likeliest_token_is_drawn(family):
    base = tiny_base(family)
    greedy = generate(base, PROMPTS, max_new_tokens=4)
    for edge in ({"top_p": 0.0}, {"top_p": 1e-30}, {"temperature": 1e-38}, {"temperature": 5e-324}):
        assert (
            generate(base, PROMPTS, max_new_tokens=4, **{"temperature": 1.0, **edge}) == greedy
        ), edge
    generate(base, PROMPTS[:1], max_new_tokens=4, temperature=100.0, top_p=1.0, seed=2**32 - 1)


@pytest.mark.parametrize("name", ["temperature", "top_p", "max_new_tokens"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), -float("inf")])
def test_numbers_that_mean_nothing_are_refused(name, value):
    if name == "max_new_tokens" and value != -1:
        value = 0
    with pytest.raises(ConfigError, match=name) as caught:
        generate(tiny_base("llama"), PROMPTS, **{"max_new_tokens": 2, name: value})
    assert caught.value.exit_code == 2


def test_an_adapter_that_acts_is_not_part_of_the_proof_and_changes_answers():
    from tests.support.helpers import filled_lora

    base = tiny_base("llama")
    filled_lora(base)
    plain = generate(base, PROMPTS, max_new_tokens=6)
    base.routing.active = (("a", 1.0),)
    adapted = generate(base, PROMPTS, max_new_tokens=6)
    assert decodes_packed(base) and adapted != plain
    assert adapted == reference(base.model, PROMPTS, {257}, 6)


def test_tokens_stream_without_the_stop_token_and_prompts_are_counted_as_they_finish():
    base = tiny_base("llama")
    seen: list[int] = []
    done: list[int] = []
    (answer,) = generate(
        base, [PROMPTS[2]], max_new_tokens=7, on_token=seen.append, on_done=done.append
    )
    assert seen == answer and done == [1]
    base.model.generation_config.eos_token_id = answer[3]
    seen.clear()
    assert generate(base, [PROMPTS[2]], max_new_tokens=7, on_token=seen.append) == [seen]
    assert seen == answer[: answer.index(answer[3])]
    generate(base, PROMPTS, max_new_tokens=7, on_done=done.append)
    assert done[-1] == len(PROMPTS)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom"])
def test_an_answer_ends_where_the_models_positions_end(family):
    """GPT-2 and OPT have a table of positions: one more is an IndexError. The other rows go on."""
    base = tiny_base(family, **({} if family == "bloom" else {"max_position_embeddings": 32}))
    prompts = [[9] * 30, *PROMPTS[:3], [7] * 29]
    found = generate(base, prompts, max_new_tokens=6)
    whole = generate(tiny_base(family), prompts, max_new_tokens=6) if family == "llama" else found
    limits = [6] * 5 if family == "bloom" else [2, 6, 6, 6, 3]
    assert all(len(answer) <= limit for answer, limit in zip(found, limits, strict=True))
    assert found == [answer[:limit] for answer, limit in zip(whole, limits, strict=True)]
    assert decodes_packed(base) == (family != "bloom")


def test_what_takes_transformers_loop_ends_there_too(monkeypatch):
    base = tiny_base("gpt2", max_position_embeddings=32)
    prompts = [[9] * 30, *PROMPTS[:3], [7] * 29, [5] * 29]
    expected = generate(base, prompts, max_new_tokens=6)
    record_of(base.model).keep(PackedDecoding(False))
    done: list[int] = []
    assert generate(base, prompts, max_new_tokens=6, on_done=done.append) == expected
    assert done[-1] == len(prompts)


@pytest.mark.parametrize("family", sorted(PADDED))
def test_transformers_loop_prepares_each_update_once_and_anew_after_training(family, monkeypatch):
    base, prepared, prepare = tiny_base(family), [], UpdateCache.prepared
    adapter = filled_lora(base)
    base.routing.active = (("a", 1.0),)

    def count(*args):
        prepared.append(args)
        return prepare(*args)

    for seed in (0, 1):
        fill(adapter.parameters().values(), seed=seed)
        expected = reference(base.model, PROMPTS, {EOS})
        with monkeypatch.context() as patch:
            patch.setattr(UpdateCache, "prepared", count)
            assert generate(base, PROMPTS, max_new_tokens=NEW) == expected
        assert len(prepared) == len(adapter.layers)
        prepared.clear()


def test_transformers_loop_calls_hooks_of_a_layer_that_no_acting_adapter_changes():
    base, calls = tiny_base("bloom"), []
    filled_lora(base)
    head = base.model.get_output_embeddings()
    config = LoRA(rank=3, alpha=5, targets=["dense"])
    fill(
        attach(base.model, config, name="b", routing=base.routing, head=head).parameters().values()
    )
    base.routing.active = (("b", 1.0),)
    layers = (m for n, m in base.model.named_modules() if n.endswith("query_key_value"))
    next(layers).base.register_forward_hook(lambda *_: calls.append(1))
    (answer,) = generate(base, PROMPTS[:1], max_new_tokens=NEW)
    assert len(calls) == len(answer) > 1


def test_padding_that_the_model_has_no_row_for_is_not_used():
    base = tiny_base("bloom", vocab_size=258)  # the tokenizer's own padding is 258
    assert generate(base, PROMPTS, max_new_tokens=3) == [
        generate(base, [prompt], max_new_tokens=3)[0] for prompt in PROMPTS
    ]


def test_prompts_that_are_empty_too_long_or_of_unknown_ids_are_refused_together():
    with pytest.raises(ConfigError, match="cannot be answered") as caught:
        generate(tiny_base("llama"), [[], [1] * 1024, [5, 272], [1] * 1023], max_new_tokens=10)
    assert [fault.split(" ")[1] for fault in caught.value.faults] == ["1", "2", "3"]
    assert "token 272" in caught.value.faults[2]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("layers", [[], [1]], ids=["every layer", "one layer"])
@pytest.mark.parametrize("prompts", [PROMPTS, SHARED], ids=["apart", "shared start"])
def test_answers_behind_a_trained_prefix_are_those_of_transformers(family, layers, prompts):
    from veneer.adapters.attach import attach
    from veneer.adapters.config import Prefix

    base = tiny_base(family)
    plain = generate(base, prompts, max_new_tokens=NEW)
    config = Prefix(tokens=5, start="random", layers=layers)
    attachment = attach(
        base.model,
        config,
        name="p",
        routing=base.routing,
        head=base.model.get_output_embeddings(),
        seed=0,
    )
    fill(attachment.parameters().values())
    base.routing.active = (("p", 1.0),)
    found = generate(base, prompts, max_new_tokens=NEW)
    assert decodes_packed(base)
    assert found == reference(base.model, prompts, {EOS})
    # In long prompts five faint keys may change no token: windows leave them behind, others
    # outweigh them.
    assert found != plain or prompts is SHARED
