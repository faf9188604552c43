"""What torch's flex attention computes, exactly, with a gradient on a CPU, which its own has not;
it asks every pair of rows, and checks the lists of blocks by them."""

import torch
from torch.nn.attention.flex_attention import AuxOutput, create_mask


def exact(q, k, v, *, score_mod, block_mask, scale, enable_gqa, return_aux):
    heads, rows = q.shape[1], q.shape[2]
    assert enable_gqa == (heads != k.shape[1]) and return_aux.lse
    k, v = (each.repeat_interleave(heads // each.shape[1], 1) for each in (k, v))
    visible = create_mask(block_mask.mask_mod, 1, 1, rows, rows, device="cpu")[0, 0]
    checked(visible, block_mask)
    scores = score_mod((q @ k.transpose(2, 3)) * scale, *[None] * 4)
    scores = scores.masked_fill(~visible, float("-inf"))
    return torch.softmax(scores, -1) @ v, AuxOutput(lse=torch.logsumexp(scores, -1))


def checked(visible, block_mask):
    """Whatever is seen lies in a listed block, and of a block that is listed as whole all is
    seen."""
    size, listed = block_mask.BLOCK_SIZE[0], torch.zeros_like(visible)
    for counts, numbers, whole in (
        (block_mask.kv_num_blocks, block_mask.kv_indices, False),
        (block_mask.full_kv_num_blocks, block_mask.full_kv_indices, True),
    ):
        for row, count in enumerate(counts[0, 0].tolist()):
            for column in numbers[0, 0, row, :count].tolist():
                place = (
                    slice(row * size, (row + 1) * size),
                    slice(column * size, (column + 1) * size),
                )
                assert not listed[place].any(), "a block is listed twice"
                assert not whole or visible[place].all()
                listed[place] = True
    assert (listed | ~visible).all()
