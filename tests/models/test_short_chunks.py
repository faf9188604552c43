"""State spaces in short chunks compute what they do in those of their config."""

import json

import pytest
import torch
from torch import nn

import veneer
from tests.families.models import save_family
from veneer.models.short_chunks import CHUNK, shorten_chunks, take_short_chunks

CLOSE = 1e-5
"""Of the largest value: float32 sums in another order."""


def near(ours, theirs):
    return (ours - theirs).abs().max() <= CLOSE * theirs.abs().max()


@pytest.mark.parametrize("family", ["granitemoehybrid", "falcon_h1"])
def test_a_loaded_base_reads_short_chunks_with_the_same_states_and_gradients(family, tmp_path):
    path, own = save_family(family, tmp_path) / "config.json", 2 * CHUNK
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mamba_chunk_size": own}))
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
