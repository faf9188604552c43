"""From a source that the user named to a FrozenBase: found, checked, loaded, frozen, fingerprinted.

Weights are read in the dtype in which they are stored, and then widened where that computes faster
(bases/compute.py): which base it is rests on the stored values. Whatever would leave a weight at
random values is refused, not reported.

Not known here: where models come from (bases/names/sources.py), what a config may say
(bases/config/model_config.py), how each weight format is read (bases/loading/builders.py,
bases/loading/dense.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from veneer.bases.compute import DTYPES, Compute, HeldAs, choose
from veneer.bases.config.model_class import parts_not_read
from veneer.bases.config.model_config import check_size, checked_config
from veneer.bases.folder.faults import NEXT_DOWNLOAD, check_finite, check_generation
from veneer.bases.folder.model_folder import ModelFolder, weight_files
from veneer.bases.folder.stored_type import stored_type
from veneer.bases.folder.tensor_files import StoredTensor, count_values_by_type, stored_tensors
from veneer.bases.identity.byte_hashes import hashes_of
from veneer.bases.identity.fingerprint import earlier_fingerprint, fingerprint
from veneer.bases.loading.builders import builder_for
from veneer.bases.loading.dense import build_dense
from veneer.bases.loading.own_pages import take_own_pages
from veneer.bases.loading.streaming import Placed, build_packed, stores_single_experts
from veneer.bases.loading.widen import widen
from veneer.bases.names.sources import locate, locate_blocks
from veneer.bases.packed.formats import stored_format
from veneer.bases.quiet_transformers import quiet
from veneer.bases.stop_tokens import stop_token_ids
from veneer.bases.tokenizer import check_vocabulary, read_tokenizer
from veneer.errors import (
    ConfigError,
    CorruptFileError,
    DoesNotFitError,
    RefusedError,
    VeneerError,
    is_out_of_memory,
)
from veneer.execution.decoder_layer import decoder_layers
from veneer.execution.proofs.same_values import same_values, take_note
from veneer.models.checkpointing import give_back
from veneer.models.few_rows import take_few_rows
from veneer.models.frozen_base import FrozenBase
from veneer.quant.config import FOUR_BITS, Quantize, weight_format
from veneer.shards import Shards


def load_base(
    source: str,
    *,
    dtype: HeldAs = "auto",
    device: str = "auto",
    quantize: Quantize | None = None,
    keep_dense: Sequence[str] = (),
    shards: Shards | None = None,
    own_pages: bool = False,
) -> FrozenBase:
    """The frozen base that `source` names (see sources.locate), with its tokenizer and fingerprint.

    dtype   auto: as stored, or float32 on a CPU whose products in the stored type are slow; stored:
            as stored. Widening to float32 keeps the fingerprint; a type that rounds the stored
            values is another base's
    device  auto: CUDA if there is any, else the CPU; or a torch device such as cpu, cuda:1, mps
    quantize  the format its linear layers are held in (bases/loading/builders.py); None: as they
              are stored, which may be packed: a folder with such weights (bases/packed/formats.py)
              is read as it is
    keep_dense  modules (names, or endings of paths) that stay as they are stored
    shards  holds this process's run of every decoder layer; all processes load together then. None:
            all of it is here
    own_pages  weights that are mapped from files move into memory of this process
               (bases/loading/own_pages.py): for one that reads them again and again, alone on its
               machine

    Raises SourceError (not found, not a causal LM, no fast tokenizer), UnsafeFileError (pickles,
    code), CorruptFileError (damaged, missing or misshapen weights), DoesNotFitError (memory),
    ConfigError (unknown dtype, device or weight format).
    """
    build = builder_for(quantize, keep_dense)
    place = _device(device)
    if dtype not in ("auto", "stored", *DTYPES):
        raise ConfigError(
            f"unknown dtype {dtype!r}",
            next_step=(
                f"One of auto, {', '.join(DTYPES)}; auto takes the stored one, or float32 where"
                " that is slow."
            ),
        )
    found, tensors, held = _files(source, quantize)
    stored = count_values_by_type(tensors)
    if held is not None:
        name, _ = held
        if quantize not in (None, name):
            raise ConfigError(
                f"{found.folder} holds its weights as {name}, not as {quantize}",
                next_step="Leave quantize out: such a folder is read as it is.",
            )
        quantize, build = name, partial(build_packed, book=None)
    elif weight_format(quantize).from_folder:
        raise ConfigError(
            f"{found.folder} does not hold its weights as {quantize}, and nothing here makes such"
            " weights",
            next_step=f"Leave quantize out, or take {FOUR_BITS}.",
        )
    elif build is None and stores_single_experts(tensors):
        build = partial(build_packed, book=None)
    if shards is not None:
        layer_by_layer: Any = build or partial(build_packed, book=None)
        build = partial(layer_by_layer, placed=_taking(shards))
    compute = choose(stored_type(found.folder, stored, held, dtype), dtype, place)
    with quiet():
        config = checked_config(found.folder)
        tokenizer = read_tokenizer(found.folder)
        with _explained(found, compute.held, sum(stored.values())):
            if not weight_format(quantize).from_gguf:
                check_size(found.folder, config, stored, len(tensors))
            read_as = compute.stored if compute.widens else compute.held
            if build is not None:
                model = build(found, config, read_as, place)
            else:
                model = build_dense(found.folder, config, read_as)
            if own_pages and not compute.widens and place.type == "cpu":
                take_own_pages(model)
            hashes = None if shards is not None else hashes_of(model)
            if build is None:
                torch.nn.Module.to(
                    model, place
                )  # the hashes read the weights that are still on the CPU
            if shards is not None and not len(shards):
                raise RefusedError(
                    f"{type(model).__name__} has no list of decoder layers, and shard holds each of"
                    " them in shards",
                    next_step="Leave shard out: every process then holds the whole base.",
                )
            model.eval()
            if shards is None and not compute.widens:
                take_note(model, hashes)
            identity = as_held = fingerprint(model, hashes)
            if compute.widens:
                if shards is not None:
                    shards.changed(lambda layer: layer.to(compute.held))
                    give_back()
                widen(model, compute.held)
                if shards is None:
                    take_note(model)
                as_held = earlier_fingerprint(model)
            if model.generation_config is not None:
                check_generation(found.folder, model.generation_config)
            check_vocabulary(found.folder, tokenizer, model)
            model.requires_grad_(False)
            take_few_rows(model)
            same_values(
                "finite", model, bool, lambda: check_finite(found.folder, model)
            )  # hashed by now
    if (generation := model.generation_config) is not None:
        generation.eos_token_id = list(stop_token_ids(tokenizer, generation)) or None
    return FrozenBase(
        model=model,
        tokenizer=tokenizer,
        source=source,
        name_or_path=found.name_or_path,
        revision=found.revision,
        quantize=quantize,
        compute=compute,
        identity=identity,
        as_held=as_held,
        shards=shards,
        not_read=parts_not_read(config, tensors, model),
    )


def _taking(shards: Shards) -> Placed:
    """Takes each decoder layer as soon as all its weights are there: at most one is whole while
    they are read."""
    left: list[nn.Module] | None = None

    def placed(model: PreTrainedModel) -> None:
        nonlocal left
        if left is None:
            left = list(decoder_layers(model) or ())
        while left and not any(each.is_meta for each in left[0].parameters()):
            shards.take(left.pop(0).requires_grad_(False))
            # What was read of it leaves holes, into which the next layer's run does not fit.
            give_back()

    return placed


def compute_of(source: str, *, dtype: HeldAs, device: str, quantize: Quantize | None) -> Compute:
    """What load_base would hold the weights in; only headers are read. Raises as load_base does."""
    found, tensors, held = _files(source, quantize)
    stored = count_values_by_type(tensors)
    return choose(stored_type(found.folder, stored, held, dtype), dtype, _device(device))


def _files(
    source: str, quantize: Quantize | None
) -> tuple[ModelFolder, dict[str, StoredTensor], tuple[Quantize, torch.dtype] | None]:
    """Where the base is, what its files hold, and of weights that are packed in them the format and
    the type before."""
    blocks = weight_format(quantize).from_gguf
    found = locate_blocks(source) if blocks else locate(source)
    tensors = stored_tensors(weight_files(found.folder))
    return found, tensors, None if blocks else stored_format(found.folder, tensors)


@contextmanager
def _explained(found: ModelFolder, dtype: torch.dtype, num_values: int) -> Iterator[None]:
    """What can go wrong while weights are read, as errors that say what to do."""
    gib = num_values * dtype.itemsize / 2**30
    too_large = DoesNotFitError(
        f"the base {found.name_or_path} does not fit into memory: its weights take {gib:.1f} GiB as"
        f" {dtype}",
        next_step="Free memory, take a smaller base, or load it as bfloat16.",
    )
    try:
        yield
    except VeneerError:
        raise
    except (
        Exception
    ) as fault:  # whatever a checkpoint makes transformers trip over is about that checkpoint
        if is_out_of_memory(fault):
            raise too_large from fault
        raise CorruptFileError(
            f"transformers cannot load the model in {found.folder}",
            [f"{type(fault).__name__}: {line}" for line in str(fault).splitlines()[:4]],
            NEXT_DOWNLOAD,
        ) from fault


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as fault:
        raise ConfigError(
            f"the device {name!r} cannot be used here",
            [str(fault).splitlines()[0]],
            "Take auto or cpu.",
        ) from fault
    return device
