"""On a device that is no CPU: every operation finds its tensors in one place, and the host waits a
fixed number of times.

The device is pretended (tests/support/accelerator.py), the code is not: load, prove, attach, train,
evaluate, decode, offload, merge and store run as they are, on every method, weight format and
family of the tests. How often the host waits is stated here in full; a change that makes it wait
more often fails, and one that makes it wait less changes the number.
"""

from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.adapters.test_methods import BASES, METHODS, move, written
from tests.support.accelerator import Accelerator, Mixed
from tests.support.helpers import evaluation_loss, make_examples, merge_in_memory
from tests.support.models.routed import batch_loss
from veneer.adapters.config import LoRA
from veneer.data.batching import make_batch
from veneer.decoding import generate as answers
from veneer.decoding.generate import generate
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.formats.loading import load_adapter
from veneer.kernels.attention import packed as attention
from veneer.kernels.cuda import launch
from veneer.kernels.dense import rank
from veneer.merge.combine.extract import extract_adapter
from veneer.merge.fold.folder import merge_into_folder
from veneer.models.checkpointing import checkpointed
from veneer.models.likelihood import example_nats
from veneer.models.load import load_base
from veneer.models.starts.initial_values import begin
from veneer.training.config import RunConfig
from veneer.training.inputs import TrainingInputs
from veneer.training.loop import Loop
from veneer.training.optimizer import offload
from veneer.training.optimizer.buffer import FlatParameters
from veneer.training.optimizer.offload import Offload, offloaded
from veneer.training.output.screen import QuietScreen
from veneer.training.trainee import Trainee

DEVICES = {"cuda": Accelerator("cuda:0"), "mps": Accelerator("mps:0", lacks=(torch.float64,))}
EXAMPLES = make_examples(8)
PROMPTS = [[5, 9, 30, 7, 5], [5, 9, 30, 61, 2, 8, 44]]
LAYERS, EXPERTS = 2, 4
DEVICE_BASES = {name: base for name, base in BASES.items() if not name.endswith(" narrow")}
"""Bases of a device: weights in bf16 under products in float32 are held on a CPU alone."""
"""Of the tiny models: decoder layers, experts a layer."""
MIXTURES = ("mixtral", "qwen3_moe")
CPU = SimpleNamespace(device=torch.device("cpu"), holds=lambda tensor: True)


@pytest.fixture(autouse=True)
def _whatever_this_machine_has(monkeypatch):
    monkeypatch.setattr(
        launch, "module", lambda name: None
    )  # it would launch on the pretended device
    monkeypatch.setattr(attention, "declined", lambda *_: "pretended")
    monkeypatch.setattr(offload, "WORTH_BYTES", 512)


@contextmanager
def on(name):
    with DEVICES[name] as there:
        yield there


_bases = {}


@pytest.fixture(autouse=True, scope="module")
def _kept_for_these_tests_alone():
    yield
    _bases.clear()


def base_on(there, family, dtype=torch.float32):
    """A base loaded onto the device, its paths proven; kept, so whoever attaches detaches."""
    key = str(there.device), family, dtype
    if key not in _bases:
        quantize = family.partition(" ")[2] or None
        name = str(dtype).removeprefix("torch.")
        base = load_base(
            str(written(family)), device=str(there.device), dtype=name, quantize=quantize
        )
        assert base.paths and base.device == there.device
        assert all(there.holds(t) for t in [*base.model.parameters(), *base.model.buffers()])
        _bases[key] = base
    return _bases[key]


@contextmanager
def attached(there, base, config):
    """An adapter that acts, with values off their start."""
    attachment = begin(base, config, name="a", examples=EXAMPLES).attachment
    try:
        assert all(there.holds(p) for p in attachment.parameters().values())
        move(attachment)
        base.routing.active = (("a", 1.0),)
        yield attachment
    finally:
        base.routing.active = ()
        if "a" in base.attachments:
            base.detach("a")


def make_loop(base, parameters, factors=None, **settings):
    config = RunConfig(base="b", data="d", out="o", batch=4, micro_batch=4, **settings)
    job = TrainingInputs(
        model=base.model,
        paths=base.paths,
        routing=base.routing,
        adapters=base.routing.acting.whole,
        flat=FlatParameters(parameters, factors),
        train=EXAMPLES,
        validation=EXAMPLES,
        config=config,
        learning_rate=0.01,
        steps=5,
        out=Path("nowhere"),
        sample=None,
    )
    records = SimpleNamespace(write=lambda record: None)
    return Loop([Trainee(job, records, QuietScreen(), origin=None, resume_from=None)])


def step_waits(there, loop):
    """Of one training step after the first: batch, forward, backward, update, record."""
    loop.step()
    with there.counting() as waits:
        loop.step()
    return waits


def choices(attachment):
    """Reads of one forward through adapted experts: which are chosen, and the rows of each."""
    stacks = {path.rpartition(".")[0] for path in attachment.layers if ".experts." in path}
    return len(stacks) * (2 + EXPERTS)


def expected_step(there, attachment, family):
    """(reads, uploads). A step reads once, its losses and its gradient's norm; to CUDA nothing that
    it brings is waited for, elsewhere its ids and its layout are."""
    config, reads, uploads = attachment.config, 1, 0 if there.device.type == "cuda" else 2
    if config.through_attention and uploads:
        uploads += 1  # the same documents behind the prefix
    if config.name == "dora":  # whether a row of magnitude 0 is lost: asked of every linear layer
        reads += sum(not path.endswith(("embed_tokens", "wte")) for path in attachment.layers)
    return reads + choices(attachment), uploads


def trains_evaluates_and_decodes(there, base, config, family):
    with attached(there, base, config) as attachment:
        loop = make_loop(base, attachment.parameters(), attachment.learning_rate_factors())
        waits, expected = step_waits(there, loop), expected_step(there, attachment, family)
        assert waits.counts == expected, waits
        evaluates_and_decodes(there, base, attachment, family)


def evaluates_and_decodes(there, base, attachment, family):
    with there.counting() as waits:
        evaluation_loss(base.model, base.paths, base.routing, EXAMPLES, batch=4)
    chosen, batches = choices(attachment), 2
    forward = 0 if there.device.type == "cuda" else 3 if attachment.config.through_attention else 2
    assert waits.counts == (1 + batches * chosen, batches * forward), waits
    with there.counting() as waits:
        example_nats(base, EXAMPLES, batch=4)  # these short ones are one batch
    assert waits.counts[0] == 1 + chosen, waits
    if not base.paths.packed:
        if there.device.type == "cuda":  # transformers' loop asks torch itself for a stream of mps
            generate(base, PROMPTS, max_new_tokens=3)
        return
    generate(base, PROMPTS, max_new_tokens=1)  # proven, and caught up with
    asked = (0, 3) if there.device.type == "cuda" else (7, 11)
    for drawn, expected in (
        ({}, (1, asked[0])),
        ({"temperature": 0.7, "top_p": 0.9}, (1, asked[1])),
    ):
        found = []
        for tokens in (2, 3):
            with there.counting() as waits, pytest.MonkeyPatch.context() as patch:
                patch.setattr(answers, "stop_token_ids", lambda *_: ())  # both rows go on
                generate(base, PROMPTS, max_new_tokens=tokens, **drawn)
            found.append(waits)
        more = tuple(b - a for a, b in zip(found[0].counts, found[1].counts, strict=True))
        assert expected[0] <= more[0] <= expected[0] + chosen and more[1] == expected[1], found[1]


CELLS = [
    (method, list(DEVICE_BASES)[number % len(DEVICE_BASES)])
    for number, method in enumerate(METHODS)
]
"""Each method over the next format; tests/soak/models/test_accelerator_cells.py has all of them."""


@pytest.mark.parametrize(("method", "base"), CELLS, ids=[f"{m}-{b}" for m, b in CELLS])
def test_every_method_over_a_format_trains_evaluates_and_decodes_there(method, base):
    with on("cuda") as there:
        family, dtype = DEVICE_BASES[base]
        trains_evaluates_and_decodes(
            there, base_on(there, family, dtype), METHODS[method].config, family
        )


@pytest.mark.parametrize("family", ["gemma2", "mistral", "bloom", "falcon", "opt", *MIXTURES])
def test_every_family_trains_evaluates_and_decodes_there(family):
    with on("cuda") as there:
        config = LoRA(rank=3, alpha=5.0, dropout=0.2)
        trains_evaluates_and_decodes(there, base_on(there, family), config, family)


@pytest.mark.parametrize(
    ("method", "base"),
    [
        ("pissa", "llama nf4"),
        ("dora", "gpt2 bfloat16"),
        ("houlsby", "llama nf4"),
        ("prefix", "gpt2 bfloat16"),
    ],
)
def test_where_there_is_no_float64_all_of_it_runs_too(method, base):
    with on("mps") as there:
        family, dtype = DEVICE_BASES[base]
        trains_evaluates_and_decodes(
            there, base_on(there, family, dtype), METHODS[method].config, family
        )


@contextmanager
def own_base(there, family="llama", dtype=torch.float32):
    """A base that is changed, so not kept."""
    key = str(there.device), family, dtype
    kept = _bases.pop(key, None)
    try:
        yield base_on(there, family, dtype)
    finally:
        _bases.pop(key, None)
        if kept is not None:
            _bases[key] = kept


def test_full_fine_tuning_waits_as_an_adapter_does():
    with on("cuda") as there, own_base(there, dtype=torch.bfloat16) as base:
        waits = step_waits(there, make_loop(base, dict(base.model.named_parameters())))
        assert waits.counts == (1, 0), waits


def test_sums_that_are_exact_wait_once_too():
    with on("cuda") as there:
        base = base_on(there, "llama")
        with attached(there, base, LoRA(rank=2)) as attachment:
            waits = step_waits(there, make_loop(base, attachment.parameters(), reduce="exact"))
            assert waits.counts == (1, 0), waits


@pytest.mark.parametrize(
    ("method", "family"),
    [*((m, "llama") for m in ("lora", "dora", "parallel", "prefix")), ("lora", "mixtral")],
)
def test_checkpointing_and_offload_wait_no_more_and_change_no_bit(method, family):
    config = METHODS[method].config
    with on("cuda") as there:
        base = base_on(there, family)
        with attached(there, base, config) as attachment:
            parameters = list(attachment.parameters().values())
            hooks = Offload([*base.model.parameters(), *parameters], moves="cuda")
            found = {}
            for way in ("plain", "checkpointed", "offloaded"):
                for parameter in parameters:
                    parameter.requires_grad_(True).grad = None
                with (
                    checkpointed(base.model, base.routing, on=way == "checkpointed"),
                    there.counting() as waits,
                ):
                    batch = make_batch(
                        EXAMPLES, packed=True, share_prompt=True, device=there.device
                    )
                    with offloaded(hooks if way == "offloaded" else None):
                        loss = batch_loss(base, batch, total=9.0)
                    loss.backward()
                found[way] = [p.grad for p in parameters]
                again = choices(attachment) if way == "checkpointed" else 0
                expected = expected_step(there, attachment, family)
                assert waits.counts == (expected[0] - 1 + again, expected[1]), (way, waits)
            for way in ("checkpointed", "offloaded"):
                assert all(map(torch.equal, found["plain"], found[way])), way


def test_what_was_offloaded_comes_back_in_the_strides_it_had():
    with on("cuda") as there:
        hooks, whole = Offload([], moves="cuda"), torch.randn(64, 96).to(there.device)
        for view in (whole.T, whole[:, 32:64], whole[::2], whole.view(96, 64)):
            saved = hooks.pack(view)
            assert not there.holds(saved.host)
            back = hooks.unpack(saved)
            assert there.holds(back) and (back.shape, back.stride()) == (view.shape, view.stride())
            assert torch.equal(back, view)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", ["lora, embedding", "dora"])
def test_a_merge_stays_there_until_it_is_written_and_gives_the_bits_of_a_merge_on_the_cpu(
    method, device, tmp_path
):
    config = METHODS[method].config
    written_files = {}
    for place in ("cpu", device):
        with (
            nullcontext(CPU) if place == "cpu" else on(device) as there,
            own_base(there) as base,
            attached(there, base, config),
        ):
            merge_in_memory(base.model, [(base.attachments["a"], 1.0)]).restore()
            merge_into_folder(
                base, [("a", 0.5)], tmp_path / place, dtype="bf16", stochastic=True, seed=3
            )
        written_files[place] = load_file(tmp_path / place / "model.safetensors")
    for name, tensor in written_files["cpu"].items():
        assert torch.equal(written_files[device][name], tensor), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("start", ["eva", "loftq"])
def test_starts_that_look_at_rows_and_at_files_are_made_there(start, device):
    with (
        on(device) as there,
        attached(there, base_on(there, "llama nf4"), LoRA(rank=3, init=start)) as made,
    ):
        assert made.config.init == start


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_is_written_from_there_and_read_back(method, tmp_path):
    with on("cuda") as there:
        base = base_on(there, "llama")
        with attached(there, base, METHODS[method].config) as attachment:
            write_adapter(
                tmp_path / "a", attachment, manifest_for(base, method="x"), model=base.model
            )
            values = [p.detach().clone() for p in attachment.parameters().values()]
        loaded = load_adapter(base, tmp_path / "a", name="a")
        assert all(there.holds(p) for p in loaded.parameters().values())
        assert loaded.num_parameters and values
        base.detach("a")


def test_an_adapter_is_extracted_there_without_float64(tmp_path):
    with on("mps") as there:
        base = base_on(there, "llama")
        with attached(there, base, LoRA(rank=3, alpha=5.0)):
            merge_into_folder(base, [("a", 1.0)], tmp_path / "tuned")
        made = extract_adapter(
            str(written("llama")),
            str(tmp_path / "tuned"),
            out=tmp_path / "a",
            rank=3,
            device="mps:0",
        )
        assert made.error < 1e-4


@pytest.mark.parametrize(("device", "expected"), [("cuda", torch.float32), ("mps", torch.bfloat16)])
def test_sums_over_rows_of_the_trained_sides_are_not_rounded_on_cuda(device, expected):
    u, x = (torch.randn(96, width).bfloat16() for width in (4, 48))
    with Accelerator(device) as there:
        found = rank.gradient(u.to(there.device), x.to(there.device), 0.5)
        assert found.dtype == expected and there.holds(found)
        found = found.cpu()
    exact = 0.5 * (u.double().T @ x.double())
    error = ((found - exact).abs().max() / exact.abs().max()).item()
    assert error < (1e-6 if expected == torch.float32 else 1e-2)


# What is planted is found.


def planted(there, base, config, monkeypatch, where, fault):
    """A training step in which `fault` happens whenever `where` (a class) is run."""
    forward = where.forward

    def wrong(self, x, *others, **named):
        return forward(self, fault(x), *others, **named)

    with attached(there, base, config) as attachment:
        loop = make_loop(base, attachment.parameters())
        loop.step()
        monkeypatch.setattr(where, "forward", wrong)
        with there.counting() as waits:
            loop.step()
    return waits


FAULTS = {
    "a tensor of the CPU": lambda x: x + torch.ones(x.shape[-1]),
    "a product with one": lambda x: x @ torch.eye(x.shape[-1], dtype=x.dtype),
    "indices into the CPU": lambda x: x + torch.zeros(9)[x.flatten()[:1].long() * 0].item(),
    "numpy": lambda x: torch.from_numpy(np.asarray(x.detach())),
    "draws of the CPU": lambda x: x.clone().bernoulli_(generator=torch.Generator()),
    "a fresh tensor of a generator of the CPU": lambda x: (
        x + torch.rand(x.shape, generator=torch.Generator(), device=x.device)
    ),
}
WAITS = {
    "item": (1, 0, lambda x: x * (1 if x.sum().item() else 2)),
    "bool": (1, 0, lambda x: x * (1 if (x == 0).any() else 2)),
    "float": (1, 0, lambda x: x + 0 * float(x.detach().sum())),
    "cpu": (1, 1, lambda x: x + x.detach().cpu().to(x.device) * 0),
    "tolist": (1, 0, lambda x: x + 0 * sum(x[0, 0].tolist())),
    "nonzero": (1, 0, lambda x: x + 0 * len(x[0, 0].nonzero())),
    "unique": (1, 0, lambda x: x + 0 * len(x[0, 0].detach().unique())),
    "a mask as an index": (1, 0, lambda x: x + 0 * len(x[x > 0])),
    "masked_select": (1, 0, lambda x: x + 0 * len(x.masked_select(x > 0))),
    "equal": (1, 0, lambda x: x * (1 if torch.equal(x, x) else 2)),
    "a copy into a tensor of the CPU": (
        1,
        0,
        lambda x: (torch.empty(x.shape).copy_(x.detach()), x)[1],
    ),
    "a list as an index": (0, 1, lambda x: x + 0 * x.detach()[0, [0, 1]].sum()),
    "a tensor of numbers": (0, 1, lambda x: x * torch.tensor([1.0], device=x.device)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tensor_of_another_place_is_found(fault, monkeypatch):
    with on("cuda") as there:
        base = base_on(there, "llama")
        norm = type(base.model.model.norm)
        with pytest.raises((Mixed, TypeError)):
            planted(there, base, LoRA(rank=2), monkeypatch, norm, FAULTS[fault])


@pytest.mark.parametrize("wait", WAITS)
def test_a_wait_more_is_counted(wait, monkeypatch):
    with on("cuda") as there:
        base = base_on(there, "llama")
        reads, uploads, fault = WAITS[wait]
        norms = 2 * LAYERS + 1
        found = planted(there, base, LoRA(rank=2), monkeypatch, type(base.model.model.norm), fault)
        assert found.counts == (1 + norms * reads, norms * uploads), found


def test_what_torch_takes_from_anywhere_is_let_through():
    with on("cuda") as there:
        x = torch.ones(3, 4, device=there.device)
        with there.counting() as waits:
            for number in (x + torch.tensor(2.0), x * 3, torch.where(x > 0, x, torch.tensor(0.0))):
                assert there.holds(number)
            x[1] = 5.0
            assert there.holds(x[0].clone()) and there.holds(torch.zeros_like(x))
            assert there.holds(x.new_zeros(2)) and not there.holds(
                torch.zeros_like(x, device="cpu")
            )
        assert waits.counts == (0, 0), waits
        assert (x.device, x.is_cuda, x.is_cpu, x.get_device()) == (there.device, True, False, 0)


def test_a_type_that_the_device_lacks_is_refused():
    with on("mps") as there, pytest.raises(Mixed, match=r"no torch\.float64"):
        torch.ones(3, device=there.device).double()
