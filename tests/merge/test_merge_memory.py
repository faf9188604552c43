"""A merge holds one layer at a time: what it allocates does not grow with the number of layers."""

import tracemalloc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.helpers import fill
from tests.support.models.tiny_gguf import with_merges
from tests.support.tiny import save_tiny
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.merge.fold.folder import merge_into_folder
from veneer.merge.gguf.model import write_gguf_model
from veneer.models.load import load_base

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
LAYER_BYTES = 4 * (
    3 * 128 * 256 + 128 * 128 * 3
)  # a layer in float32: gate, up, down; q and o, k and v of half the heads


class NewBytes(TorchDispatchMode):
    """Bytes of the tensors that operations have made since it was entered and that still live;
    peak: the most."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {
            t.untyped_storage()._cdata
            for t in tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage._cdata not in before:
                    self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return made


def peaks(folder, layers, quantize, merge):
    """(torch's, numpy's and Python's) largest number of bytes at once, beyond what the loaded base
    takes."""
    source = with_merges(
        save_tiny(folder / f"{layers}", "llama", num_hidden_layers=layers, **SIZES)
    )
    base = load_base(str(source), quantize=quantize)
    head = base.model.get_output_embeddings()
    made = attach(base.model, LoRA(rank=4, alpha=7), name="x", routing=base.routing, head=head)
    fill(made.parameters().values(), scale=0.1)
    tracemalloc.start()
    try:
        with NewBytes() as counted:
            merge(base, folder / f"{layers}-merged")
        return counted.peak, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def into_folder(base, out):
    merge_into_folder(base, [("x", 1.0)], out, dtype="fp32", check_logits=False)


def into_gguf(base, out):
    write_gguf_model(base, [("x", 1.0)], out, type="f16")


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("merge", [into_folder, into_gguf])
def test_a_merge_allocates_for_one_layer_and_not_for_all(merge, quantize, tmp_path):
    few, _ = peaks(tmp_path, 4, quantize, merge)
    many, other = peaks(tmp_path, 16, quantize, merge)

    assert LAYER_BYTES / 8 < many < 4 * LAYER_BYTES and other < 4 * LAYER_BYTES
    assert many <= 1.1 * few
