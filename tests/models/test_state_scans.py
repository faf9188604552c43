"""State spaces that read texts by our scan compute what transformers' scan does."""

import pytest
import torch
from torch import nn

import veneer
from tests.families.models import save_family
from tests.support.sharding import absent_processes
from veneer.kernels.layers.state_scan import LONGEST_CHUNK
from veneer.models.load import load_base
from veneer.models.state_scans import assume_scans, has_scan, take_scans

CLOSE = 1e-5
"""Of the largest value: float32 sums in another order."""
FAMILIES = ["granitemoehybrid", "falcon_h1", "bamba", "mamba2", "nemotron_h", "zamba2"]


def near(ours, theirs):
    return (ours - theirs).abs().max() <= CLOSE * theirs.abs().max()


def mixers_of(model):
    return [module for module in model.modules() if hasattr(module, "A_log")]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_a_loaded_base_gives_the_same_outputs_and_gradients(family, tmp_path):
    save_family(family, tmp_path)
    model = veneer.load(str(tmp_path), device="cpu").model
    mixers = mixers_of(model)
    assert mixers and all(map(has_scan, mixers))
    for length in (1, LONGEST_CHUNK + 1, 3 * LONGEST_CHUNK + 7):
        for mixer in mixers:
            draw = torch.Generator().manual_seed(length)
            x = torch.randn(2, length, mixer.hidden_size, generator=draw).requires_grad_()
            outputs = [mixer(x), type(mixer).forward(mixer, x)]
            grad = torch.randn(x.shape, generator=draw)
            assert near(*outputs)
            assert near(*(torch.autograd.grad(y, x, grad)[0] for y in outputs))


@pytest.mark.parametrize("family", ["granitemoehybrid", "falcon_h1", "mamba2"])
def test_a_base_in_shards_reads_by_the_same_scan(family, tmp_path):
    """Otherwise it would not give the bits of a whole base, and a plan would count too much."""
    save_family(family, tmp_path)
    whole = load_base(str(tmp_path), device="cpu")
    with absent_processes(2) as sharding:
        parts = load_base(str(tmp_path), device="cpu", sharding=sharding)
        for base in (whole, parts):
            mixers = mixers_of(base.model)
            assert mixers and all(map(has_scan, mixers))


def mamba2_chunk_scan(x, dt, A, B, C, chunk_size, **_):
    """Stands for transformers' function in the class below. It knows steps of 1 alone."""
    return x.float().cumsum(1)


class Mixer(nn.Module):
    """Sums x. Its step is the same in every token."""

    def __init__(self, step):
        super().__init__()
        self.hidden_size, self.step, self.conv1d = 8, step, nn.Conv1d(8, 8, 1)

    def forward(self, x):
        ones = torch.ones_like(x[..., :1])
        groups = ones[..., None], ones[..., None]
        y = mamba2_chunk_scan(
            x.unflatten(2, (1, -1)), self.step * ones, x.new_zeros(1), *groups, chunk_size=32
        )
        return y.flatten(2)


def test_a_layer_that_would_compute_something_else_keeps_its_own_scan():
    mixers = [Mixer(1.0), Mixer(2.0), nn.Linear(8, 8)]
    take_scans(nn.ModuleList(mixers))
    assert [has_scan(mixer) for mixer in mixers] == [True, False, False]


def test_a_plan_takes_the_scan_without_values():
    with torch.device("meta"):
        mixer = Mixer(1.0)
    assume_scans(mixer)
    assert has_scan(mixer)
    assert mixer(torch.empty(1, 100, 8, device="meta")).shape == (1, 100, 8)
