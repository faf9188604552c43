"""Packed rows in layers that pass a state from token to token: each text is read from its first
token on, whoever its neighbours are."""

import pytest
import torch
from torch import nn

from tests.training.test_places import mixer
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.adapters.methods.adapted_linear import AdaptedLinear
from veneer.adapters.placement.acting import Acting, in_turn
from veneer.adapters.placement.routing import Routing
from veneer.execution import text_rows
from veneer.execution.attention import packed_states, take_packed
from veneer.execution.text_rows import TextRows, read_by_text, state_modules
from veneer.kernels.layout import BatchLayout
from veneer.models.checkpointing import checkpointed

HYBRIDS = ["lfm2", "qwen3_next", "granitemoehybrid", "bamba", "falcon_h1", "recurrent_gemma"]
PROMPTS, LENGTHS = (5, 0, 3), ((4, 17, 1), (22,), (9, 2))
"""Tokens of each group's prompt, and of its documents."""
FILLER = 7
CPU = torch.device("cpu")


def layout_of(prompts=PROMPTS, lengths=LENGTHS):
    layouts = [BatchLayout.of(*group, CPU) for group in zip(prompts, lengths, strict=True)]
    *parts, last = [(layout.rows, layout) for layout in layouts]
    return BatchLayout.joined([*parts, (last[0] + FILLER, last[1])])


def packed_rows(prompts=PROMPTS, lengths=LENGTHS):
    """(1, N) ids and positions, and the texts: their ids, and where their own tokens lie."""
    draw = torch.Generator().manual_seed(0)
    ids, positions, texts = [], [], []
    for prompt, of in zip(prompts, lengths, strict=True):
        shared = torch.randint(3, 250, (prompt,), generator=draw).tolist()
        ids, positions = ids + shared, [*positions, *range(prompt)]
        for length in of:
            own = torch.randint(3, 250, (length,), generator=draw).tolist()
            texts.append((shared + own, slice(len(ids), len(ids) + length)))
            ids, positions = ids + own, [*positions, *range(prompt, prompt + length)]
    rows = torch.tensor([[*ids, *[0] * FILLER], [*positions, *[0] * FILLER]])
    return rows[:1], rows[1:], texts


def test_each_text_is_a_row_behind_its_prompt_and_every_packed_row_comes_back():
    ids, _, texts = packed_rows()
    of = TextRows(layout_of(), ids.shape[1], CPU)
    x = torch.stack([ids, ids + 1000], dim=-1)
    spread = of.spread(x)
    assert spread.shape == (len(texts), max(len(text) for text, _ in texts), 2)
    for row, (text, _) in zip(spread, texts, strict=True):
        assert row[: len(text), 0].tolist() == text
    assert torch.equal(of.packed(spread)[:, :-FILLER], x[:, :-FILLER])


@pytest.mark.parametrize("family", HYBRIDS)
def test_packed_texts_have_the_states_and_gradients_of_each_alone(family):
    model = mixer(family)
    take_packed(model)
    names, parameters = zip(*model.model.named_parameters(), strict=True)
    model.requires_grad_(True)
    ids, positions, texts = packed_rows()
    states, _ = packed_states(model, ids, positions, layout_of())
    alone = [
        model.model(torch.tensor([text]), use_cache=False).last_hidden_state for text, _ in texts
    ]
    for (_, rows), own in zip(texts, alone, strict=True):
        torch.testing.assert_close(states[rows], own[0, -(rows.stop - rows.start) :])
    draw = torch.Generator().manual_seed(1)
    weights = torch.randn(states.shape, generator=draw)
    packed = sum((states[rows] * weights[rows]).sum() for _, rows in texts)
    by_text = sum(
        (own[0, -(rows.stop - rows.start) :] * weights[rows]).sum()
        for (_, rows), own in zip(texts, alone, strict=True)
    )
    found, expected = (
        torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (packed, by_text)
    )
    for name, ours, theirs in zip(names, found, expected, strict=True):
        if theirs is not None:
            off = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-2)
            assert off <= 2e-4, (name, float(off))


@pytest.mark.parametrize("family", HYBRIDS)
def test_adapters_of_several_jobs_act_on_their_own_texts(family):
    model, routing = mixer(family), Routing()
    take_packed(model)
    adapters = []
    for number in range(len(PROMPTS)):
        settings = LoRA(rank=number + 2, alpha=9, targets="all-linear", dropout=0.3 * (number == 1))
        made = attach(
            model,
            settings,
            name=f"job{number}",
            routing=routing,
            head=model.get_output_embeddings(),
            seed=number,
        )
        draw = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for value in made.parameters().values():
                value.copy_(torch.randn(value.shape, generator=draw) / 4)
        adapters.append(((made, 1.0),))
    for layer in state_modules(model):  # else nothing would be shown of them
        assert any(getattr(child, "base", None) is not None for child in layer.children())
    ids, positions, _ = packed_rows()
    rows = [prompt + sum(of) for prompt, of in zip(PROMPTS, LENGTHS, strict=True)]
    mixed = in_turn(list(zip(rows, adapters, strict=True))).padded(FILLER)
    with torch.no_grad(), routing.held(mixed):
        states, _ = packed_states(model, ids, positions, layout_of())
    start = 0
    for count, adapter, prompt, of in zip(rows, adapters, PROMPTS, LENGTHS, strict=True):
        part = slice(start, start + count)
        layout = BatchLayout.of(prompt, of, CPU)
        with torch.no_grad(), routing.held(Acting.everywhere(adapter)):
            own, _ = packed_states(model, ids[:, part], positions[:, part], layout)
        torch.testing.assert_close(states[part], own, rtol=1e-4, atol=5e-5)
        start += count


@pytest.mark.parametrize("family", HYBRIDS)
def test_without_a_gradient_many_texts_are_computed_in_slices(family, monkeypatch):
    model, routing = mixer(family), Routing()
    take_packed(model)
    settings = LoRA(rank=3, alpha=9, targets="all-linear")
    head = model.get_output_embeddings()
    made = attach(model, settings, name="a", routing=routing, head=head)
    with torch.no_grad():
        for value in made.parameters().values():
            value.copy_(torch.linspace(-0.3, 0.3, value.numel()).view(value.shape))
    ids, positions, texts = packed_rows()
    longest, seen = max(len(text) for text, _ in texts), []
    for module in state_modules(model):
        linear = next(child for child in module.children() if isinstance(child, AdaptedLinear))
        linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]))
    with torch.no_grad(), routing.held(Acting.everywhere(((made, 1.0),))):
        whole, _ = packed_states(model, ids, positions, layout_of())
        assert {*seen} == {(len(texts), longest)}
        seen.clear()
        monkeypatch.setattr(text_rows, "MOST_PLACES", 2 * longest + 1)
        parts, _ = packed_states(model, ids, positions, layout_of())
    assert {*seen} == {(2, longest)}
    torch.testing.assert_close(parts[:-FILLER], whole[:-FILLER], rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("family", ["lfm2", "falcon_h1"])
def test_a_checkpointed_layer_is_computed_again_by_its_own_layout(family):
    """Two forwards, then both backwards."""
    model, routing = mixer(family), Routing()
    take_packed(model)
    weight = model.get_input_embeddings().weight.requires_grad_(True)
    ids, positions, _ = packed_rows()
    other = layout_of((5, 4, 0), ((17, 4, 1), (18,), (9, 5)))

    def gradient():
        losses = [
            packed_states(model, ids, positions, layout)[0].square().sum()
            for layout in (layout_of(), other)
        ]
        return torch.autograd.grad(sum(losses), weight)[0]

    expected = gradient()
    with checkpointed(model, routing, on=True):
        assert torch.equal(gradient(), expected)


def test_layers_are_prepared_once():
    model = mixer("lfm2")
    read_by_text(model)
    (layer,) = state_modules(model)
    before = layer.forward
    read_by_text(model)
    assert layer.forward is before


def test_a_convolution_beside_the_layers_passes_no_state():
    decoder, own, other = nn.Module(), nn.Module(), nn.Module()
    own.conv, other.conv = nn.Conv1d(4, 4, 3, groups=4), nn.Conv1d(4, 4, 3)
    decoder.layers, decoder.audio = nn.ModuleList([own]), other
    assert state_modules(decoder) == [own]
