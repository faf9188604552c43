"""Loads the base that a user named: finds it, checks it, reads, freezes and fingerprints it.

Weights are read in the type in which they are stored, so that the fingerprint is that of the stored
values, and then widened if that computes faster (bases/compute.py): by products that read them, or
in memory. A model file that would leave a
weight at random values is refused.

Not known here: where models come from (bases/names/sources.py), what a config may say
(bases/config/model_config.py), how each weight format is read (bases/loading/builders.py,
bases/loading/dense.py).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from veneer.adapters.config import Full
from veneer.adapters.placement.acting import Acting
from veneer.bases.compute import DTYPES, Compute, HeldAs, choose
from veneer.bases.config.model_class import parts_not_read
from veneer.bases.config.model_config import check_size, checked_config
from veneer.bases.folder.faults import NEXT_DOWNLOAD, check_finite, check_generation
from veneer.bases.folder.model_folder import ModelFolder, weight_files
from veneer.bases.folder.score_head import has_score_head, read_score_head
from veneer.bases.folder.stored_type import stored_type
from veneer.bases.folder.tensor_files import StoredTensor, count_values_by_type, stored_tensors
from veneer.bases.identity.byte_hashes import ByteHashes, hashes_of
from veneer.bases.identity.fingerprint import Fingerprint, earlier_fingerprint, fingerprint
from veneer.bases.loading.builders import builder_for
from veneer.bases.loading.dense import build_dense
from veneer.bases.loading.own_pages import reorder_transposed, take_own_pages
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
    fault_lines,
    is_out_of_memory,
)
from veneer.execution.facts.decoder_layer import decoder_layers
from veneer.execution.proofs.same_values import remember_by_values, snapshot_values
from veneer.files.memory import give_back
from veneer.models.few_rows import take_few_rows
from veneer.models.frozen_base import FrozenBase
from veneer.models.narrow import keep_narrow
from veneer.models.own_head import OWN_HEAD, attach_head, head_width
from veneer.models.state_scans import take_scans
from veneer.private.transformers import mark_initialized
from veneer.quant.config import FOUR_BITS, Quantize, weight_format
from veneer.sharded import Sharding


def load_base(
    source: str,
    *,
    dtype: HeldAs = "auto",
    device: str = "auto",
    quantize: Quantize | None = None,
    keep_dense: Sequence[str] = (),
    sharding: Sharding | None = None,
    own_pages: bool = False,
    trains: bool = False,
) -> FrozenBase:
    """Loads the frozen base that `source` names (sources.locate), with tokenizer and fingerprint.

    dtype       auto: the stored type, or float32 on a CPU that is slow in the stored type; stored:
                always the stored type. Widening to float32 keeps the fingerprint; a type that
                rounds the stored values makes another base
    device      auto: CUDA if available, else the CPU; or a torch device such as cpu, cuda:1, mps
    quantize    format of the linear layers in memory (bases/loading/builders.py); None: as stored,
                and weights that a folder stores packed (bases/packed/formats.py) stay packed
    keep_dense  modules (names, or endings of paths) that stay as they are stored
    sharding    keeps this process's part of every decoder layer; all processes load together then;
                None: this process holds the whole base
    own_pages   copies weights that are mapped from files into this process's memory
                (bases/loading/own_pages.py), for a process that reads them often, alone on its
                machine
    trains      whether the base's own weights will train: all are then held in the type of products

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
                f"One of auto, {', '.join(DTYPES)}; auto takes the stored type, or float32 if that"
                " is slow here."
            ),
        )
    model_folder, tensors, packed = _read_headers(source, quantize)
    stored = count_values_by_type(tensors)
    quantize = _check_format(model_folder, quantize, None if packed is None else packed[0])
    if packed is not None or (build is None and stores_single_experts(tensors)):
        build = partial(build_packed, book=None)
    compute = choose(stored_type(model_folder.folder, stored, packed, dtype), dtype, place)
    if sharding is not None or trains:
        compute = replace(compute, narrow=False)
    if sharding is not None:
        layer_by_layer: Any = build or partial(build_packed, book=None)
        build = partial(layer_by_layer, placed=_take_layers(sharding, compute.held))
    with quiet():
        config = checked_config(model_folder.folder)
        tokenizer = read_tokenizer(model_folder.folder)
        with _explained(model_folder, compute.held, sum(stored.values())):
            if not weight_format(quantize).from_gguf:
                check_size(model_folder.folder, config, stored, len(tensors))
            read_as = compute.stored if compute.widens else compute.held
            if build is not None:
                model = build(model_folder, config, read_as, place)
            else:
                model = build_dense(model_folder.folder, config, read_as)
            if place.type == "cpu":
                reorder_transposed(model)
            if own_pages and (compute.narrow or not compute.widens) and place.type == "cpu":
                take_own_pages(model)
            hashes = None if sharding is not None else hashes_of(model)
            if build is None:
                # Only now, as the hashes read the weights on the CPU.
                torch.nn.Module.to(model, place)
            if sharding is not None and not sharding.units:
                raise RefusedError(
                    f"{type(model).__name__} has no list of decoder layers to shard",
                    next_step="Leave shard out: every process then holds the whole base.",
                )
            model.eval()
            identity, as_held, compute = _identify_and_widen(model, compute, hashes)
            if model.generation_config is not None:
                check_generation(model_folder.folder, model.generation_config)
            check_vocabulary(model_folder.folder, tokenizer, model)
            model.requires_grad_(False)
            take_few_rows(model)
            if sharding is not None:
                sharding.complete(model, compute.held)
            if place.type == "cpu":
                take_scans(model, is_whole=sharding is None)
            remember_by_values(
                "finite", model, bool, lambda: check_finite(model_folder.folder, model)
            )
    if (generation := model.generation_config) is not None:
        generation.eos_token_id = list(stop_token_ids(tokenizer, generation)) or None
    base = FrozenBase(
        model=model,
        tokenizer=tokenizer,
        source=source,
        name_or_path=model_folder.name_or_path,
        revision=model_folder.revision,
        quantize=quantize,
        compute=compute,
        identity=identity,
        as_held=as_held,
        sharding=sharding,
        not_read=parts_not_read(config, tensors, model),
    )
    if has_score_head(model_folder.folder):
        score = read_score_head(model_folder.folder, tensors, head_width(base.model), base.device)
        base.routing.switch(Acting.everywhere(attach_head(base, Full(), score, name=OWN_HEAD)))
    return base


def _check_format(
    model_folder: ModelFolder, wanted: Quantize | None, stored: Quantize | None
) -> Quantize | None:
    """Returns the format of the base in memory. Raises ConfigError if the folder's weights cannot
    be held as wanted."""
    if stored is not None:
        if wanted not in (None, stored):
            raise ConfigError(
                f"{model_folder.folder} holds its weights as {stored}, not as {wanted}",
                next_step="Leave quantize out: such a folder is read as it is.",
            )
        return stored
    if weight_format(wanted).from_folder:
        raise ConfigError(
            f"{model_folder.folder} does not hold its weights as {wanted}, and Veneer cannot"
            " convert weights to it",
            next_step=f"Leave quantize out, or take {FOUR_BITS}.",
        )
    return wanted


def _identify_and_widen(
    model: PreTrainedModel, compute: Compute, hashes: ByteHashes | None
) -> tuple[Fingerprint, Fingerprint, Compute]:
    """Returns the fingerprints of the stored values and of those in the type of products, and how
    weights are held. hashes: of the stored values; None if the model is sharded."""
    if hashes is not None and not compute.widens:
        snapshot_values(model, hashes)
    identity = as_held = fingerprint(model, hashes)
    if compute.widens:
        as_held = earlier_fingerprint(model, compute.held)
        kept = keep_narrow(model) if compute.narrow else []
        compute = replace(compute, narrow=bool(kept))
        widen(model, compute.held, kept)
        if hashes is not None:
            snapshot_values(model)
    return identity, as_held, compute


def _take_layers(sharding: Sharding, dtype: torch.dtype) -> Placed:
    """Returns a callback that shards each decoder layer as soon as its weights are read, so that at
    most one layer is whole."""
    waiting: list[nn.Module] | None = None

    def placed(model: PreTrainedModel) -> None:
        nonlocal waiting
        if waiting is None:
            waiting = list(decoder_layers(model) or ())
        while waiting and not any(weight.is_meta for weight in waiting[0].parameters()):
            layer = waiting.pop(0).requires_grad_(False)
            sharding.take(layer, dtype)
            for weight in layer.parameters():
                mark_initialized(weight)  # or transformers draws new values
            # The layer's weights leave holes in the heap that the next layer does not fit into.
            give_back()

    return placed


def compute_of(source: str, *, dtype: HeldAs, device: str, quantize: Quantize | None) -> Compute:
    """Returns the type in which load_base would hold the weights; reads only headers. Raises what
    load_base raises."""
    model_folder, tensors, packed = _read_headers(source, quantize)
    stored = count_values_by_type(tensors)
    return choose(stored_type(model_folder.folder, stored, packed, dtype), dtype, _device(device))


def _read_headers(
    source: str, quantize: Quantize | None
) -> tuple[ModelFolder, dict[str, StoredTensor], tuple[Quantize, torch.dtype] | None]:
    """Returns the base's folder, the tensors in its files, and of packed weights their format and
    the type before packing."""
    blocks = weight_format(quantize).from_gguf
    model_folder = locate_blocks(source) if blocks else locate(source)
    tensors = stored_tensors(weight_files(model_folder.folder))
    return model_folder, tensors, None if blocks else stored_format(model_folder.folder, tensors)


@contextmanager
def _explained(model_folder: ModelFolder, dtype: torch.dtype, num_values: int) -> Iterator[None]:
    """Turns errors while weights are read into errors that say what to do."""
    gib = num_values * dtype.itemsize / 2**30
    too_large = DoesNotFitError(
        f"the base {model_folder.name_or_path} does not fit into memory: its weights take {gib:.1f}"
        f" GiB as {dtype}",
        next_step="Free memory, take a smaller base, or load it as bfloat16.",
    )
    try:
        yield
    except VeneerError:
        raise
    except Exception as fault:  # transformers fails in many ways on a bad checkpoint
        if is_out_of_memory(fault):
            raise too_large from fault
        raise CorruptFileError(
            f"transformers cannot load the model in {model_folder.folder}",
            fault_lines(fault, 4),
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
