"""State spaces in short chunks compute what they do in those of their config."""

import json

import pytest
import torch
from torch import nn

import veneer
from tests.families.models import save_family
from tests.support.sharding import absent_processes
from veneer.models.load import load_base
from veneer.models.short_chunks import CHUNK, shorten_chunks, take_short_chunks

CLOSE = 1e-5
"""Of the largest value: float32 sums in another order."""


def near(ours, theirs):
    return (ours - theirs).abs().max() <= CLOSE * theirs.abs().max()


def save_with_long_chunks(family, folder, length):
    path = save_family(family, folder) / "config.json"
    config = json.loads(path.read_text())
    (name,) = {"chunk_size", "mamba_chunk_size"} & config.keys()
    path.write_text(json.dumps(config | {name: length}))


@pytest.mark.parametrize("family", ["granitemoehybrid", "falcon_h1"])
def test_a_loaded_base_reads_short_chunks_with_the_same_states_and_gradients(family, tmp_path):
    own = 2 * CHUNK
    save_with_long_chunks(family, tmp_path, own)
    model = veneer.load(str(tmp_path), device="cpu").model
    mixers = [module for module in model.modules() if hasattr(module, "A_log")]
    assert mixers and {mixer.chunk_size for mixer in mixers} == {CHUNK}
    for length in (1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7):
        mixer = mixers[length % len(mixers)]
        draw = torch.Generator().manual_seed(length)
        x = torch.randn(2, length, mixer.hidden_size, generator=draw).requires_grad_()
        short = mixer(x)
        mixer.chunk_size = own
        long = mixer(x)
        grad = torch.randn(long.shape, generator=draw)
        assert near(short, long)
        assert near(*(torch.autograd.grad(y, x, grad)[0] for y in (short, long)))
        mixer.chunk_size = CHUNK


@pytest.mark.parametrize("family", ["granitemoehybrid", "falcon_h1", "mamba2"])
def test_a_base_in_shards_reads_chunks_of_the_same_length(family, tmp_path):
    """Otherwise it would not give the bits of a whole base, and a plan would count too little."""
    save_with_long_chunks(family, tmp_path, 2 * CHUNK)
    whole = load_base(str(tmp_path), device="cpu")
    with absent_processes(2) as sharding:
        parts = load_base(str(tmp_path), device="cpu", sharding=sharding)
        lengths = [
            [module.chunk_size for module in base.model.modules() if hasattr(module, "chunk_size")]
            for base in (whole, parts)
        ]
    assert lengths[0] == lengths[1] and {*lengths[0]} == {CHUNK}


class Mixer(nn.Module):
    """Cuts off its state at each chunk's end, so that its length matters."""

    def __init__(self, chunk_size, keeps_state):
        super().__init__()
        self.hidden_size, self.chunk_size, self.keeps_state = 8, chunk_size, keeps_state
        self.A_log, self.conv1d = nn.Parameter(torch.zeros(8)), nn.Conv1d(8, 8, 1)

    def forward(self, x):
        chunks = [x] if self.keeps_state else x.split(self.chunk_size, dim=1)
        return torch.cat([chunk.cumsum(1) for chunk in chunks], dim=1)


def test_a_layer_that_would_compute_something_else_keeps_its_chunks():
    mixers = [Mixer(256, True), Mixer(256, False), Mixer(CHUNK // 2, True)]
    take_short_chunks(nn.ModuleList(mixers))
    assert [mixer.chunk_size for mixer in mixers] == [CHUNK, 256, CHUNK // 2]


def test_a_plan_shortens_without_values():
    with torch.device("meta"):
        mixer = Mixer(256, True)
    shorten_chunks(mixer)
    assert mixer.chunk_size == CHUNK
