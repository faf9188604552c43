"""Checks whether a low-rank file fits a base, and reports every missing, extra or misshapen tensor.

Tensors that PEFT would silently leave at their start or drop are faults here. Not known here:
folders, fingerprints.
"""

import re
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from veneer.adapters.methods.targets import find_targets
from veneer.adapters.placement.wrapping import plain_modules, unwrapped
from veneer.errors import ConfigError
from veneer.formats.layout import Fit
from veneer.formats.peft.config import PeftLoRA
from veneer.formats.peft.matching import exact_settings, matched_slots, strengths
from veneer.formats.peft.old_experts import fuse_old_experts
from veneer.formats.peft.tensors import (
    Modules,
    Slot,
    adapted_modules,
    factor_shapes,
    from_file,
    frozen_tables,
    magnitude_name,
    offset_name,
    slot_of,
    tensor_names,
    value_name,
    wrappers,
)
from veneer.formats.peft.text_names import within_language_model
from veneer.linear import matrix_shape
from veneer.wording import ranges


def fit(
    config: PeftLoRA,
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    head: nn.Module | None,
    read_past: Collection[str],
) -> Fit:
    """Finds where a low-rank file goes on a base; see layout.FileSettings.fit."""
    modules = plain_modules(model)
    plain_head = None if head is None else unwrapped(head)
    head_path = next((path for path, module in modules.items() if module is plain_head), None)
    config, tensors = within_language_model(config, tensors, modules)
    config, tensors = fuse_old_experts(config, tensors, modules)
    slots, tensors = _drop_zero_updates(
        _slots(config, tensors, modules, head_path), tensors, modules, read_past
    )
    trained, faults = _trained_modules(config, modules)
    if not slots and not faults:
        faults = ["its targets match nothing in this model"]
    if faults:
        return Fit(None, faults=faults)
    if config.use_dora and (
        unsupported := [
            slot.key
            for slot in slots
            if slot.kind == "experts" or matrix_shape(modules[slot.owner]) is not None
        ]
    ):
        return Fit(
            None,
            faults=[
                f"DoRA of {path}, which is a stack of experts or a router" for path in unsupported
            ],
        )
    if config.lora_bias and (
        unsupported := [slot.key for slot in slots if slot.kind != "linear" or slot.parameter]
    ):
        return Fit(
            None,
            faults=[f"lora_bias of {path}, which is not a linear layer" for path in unsupported],
        )
    strength_by_path = strengths(config, slots)
    settings = exact_settings(config, strength_by_path, trained)
    try:
        targets = find_targets(modules, settings, head=plain_head, read_past=read_past)
    except ConfigError as fault:
        return Fit(
            None,
            faults=fault.faults,
            next_step=(
                "On no base would it act there, nor does it in PEFT: train it again without these"
                " modules."
            ),
        )
    depth = {owner: len(group) for owner, group in wrappers(slots, modules).items()}
    replaced_paths = [f"{path}.bias" for path in targets.biases]
    replaced_paths += [
        f"{path}.{name}" for path in targets.trained for name, _ in modules[path].named_parameters()
    ]
    value_names = {path: value_name(path, targets.trained, depth) for path in replaced_paths}
    factors = tensor_names(slots, modules)
    expected: dict[str, tuple[int, ...]] = {}
    for slot in slots:
        expected |= dict(
            zip(
                factors[slot.path],
                factor_shapes(slot, strength_by_path[slot.path].rank),
                strict=True,
            )
        )
        expected |= {magnitude_name(slot): (slot.out_features,)} if config.use_dora else {}
        expected |= (
            {offset_name(factors[slot.path]): (slot.out_features,)} if config.lora_bias else {}
        )
    expected |= {name: tuple(_parameter(modules, path).shape) for path, name in value_names.items()}
    faults, concerned = _tensor_faults(tensors, expected, slots, modules, head_path)
    if faults:
        return Fit(None, faults=faults, concerned=concerned)
    scaling = {
        path: strength.scaling(rslora=config.use_rslora)
        for path, strength in strength_by_path.items()
    }
    values = {path: tensors[name] for path, name in value_names.items()}
    for slot in slots:
        name_A, name_B = factors[slot.path]
        A, B = from_file(tensors[name_A], tensors[name_B], slot)
        values |= {f"{slot.path}.A": A, f"{slot.path}.B": B}
        if config.lora_bias:
            values[f"{slot.path}.offset"] = tensors[offset_name(factors[slot.path])].float()
        if config.use_dora:
            values[f"{slot.path}.magnitude"] = tensors[magnitude_name(slot)].float()
    return Fit(settings, values, scaling)


def _slots(
    config: PeftLoRA, tensors: Mapping[str, Tensor], modules: Modules, head: str | None
) -> list[Slot]:
    slots = matched_slots(config, modules, head=head)
    if (
        config.target_modules is None
    ):  # PEFT's default for the architecture: the tensors name the targets
        known = {slot.path for slot in slots}
        named = (slot_of(path, modules) for path in adapted_modules(tensors) if path not in known)
        slots += [slot for slot in named if slot is not None]
    return slots


def _drop_zero_updates(
    slots: list[Slot], tensors: Mapping[str, Tensor], modules: Modules, read_past: Collection[str]
) -> tuple[list[Slot], Mapping[str, Tensor]]:
    """Drops zero updates of weights that the model reads directly, not through their modules.

    PEFT's all-linear adds factors there that no gradient ever reaches, so B is still zero.
    """
    names = tensor_names(slots, modules)
    unreached = [s for s in slots if (s.key if s.parameter else f"{s.path}.weight") in read_past]
    pairs = {
        slot.path: [tensors[name] for name in names[slot.path] if name in tensors]
        for slot in unreached
    }
    zero_paths = {
        path
        for path, pair in pairs.items()
        if len(pair) == 2 and not all(bool(t.any()) for t in pair)
    }
    dropped_names = {name for path in zero_paths for name in names[path]}
    remaining = {name: tensor for name, tensor in tensors.items() if name not in dropped_names}
    return [slot for slot in slots if slot.path not in zero_paths], remaining


def _trained_modules(config: PeftLoRA, modules: Modules) -> tuple[list[str], list[str]]:
    """Returns fully trained modules without children, and faults of the settings.

    PEFT compares endings of the string, not of the segments: "norm" also names input_layernorm.
    """
    trained: list[str] = []
    faults = []
    for entry in config.modules_to_save or []:
        matches = [path for path in modules if path and path.endswith(entry)]
        if not matches:
            faults.append(f"modules_to_save names {entry!r}, which the model does not have")
        for path in matches:
            submodules = [p for p in modules if p == path or p.startswith(path + ".")]
            trained += [
                p
                for p in submodules
                if p not in trained and any(True for _ in modules[p].parameters(recurse=False))
            ]
    return trained, faults


def _parameter(modules: Modules, path: str) -> Tensor:
    module, _, name = path.rpartition(".")
    return modules[module].get_parameter(name)


def _tensor_faults(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    slots: Sequence[Slot],
    modules: Modules,
    head: str | None,
) -> tuple[list[str], int]:
    compared: list[tuple[str, str, str]] = []
    frozen = frozen_tables(slots, head)
    for name in sorted(expected.keys() | tensors.keys()):
        tensor, shape = tensors.get(name), expected.get(name)
        if tensor is None:
            compared.append((name, "missing", str(shape)))
        elif shape is None:
            if (fault := _extra_fault(name, tensor, tensors, frozen, modules)) is not None:
                compared.append((name, str(tuple(tensor.shape)), fault))
        elif tuple(tensor.shape) != shape:
            compared.append((name, str(tuple(tensor.shape)), str(shape)))
    return group_by_layer(compared), len(compared)


def _extra_fault(
    name: str,
    tensor: Tensor,
    tensors: Mapping[str, Tensor],
    frozen: Mapping[str, str],
    modules: Modules,
) -> str | None:
    """Checks a tensor that no slot expects. PEFT adds copies of the base's values to some files;
    they must be equal."""
    base_name = frozen.get(name, name)
    if (copied := re.sub(r"\.(original_module|modules_to_save)(\.[^.]+)$", r"\2", name)) != name:
        # bias = "all" also saves a fully trained module's frozen original and its trained copy
        # again
        if "modules_to_save" in name.split(".")[-2:]:
            trained_copy = tensors.get(copied)
            return (
                None
                if trained_copy is not None and torch.equal(tensor, trained_copy)
                else f"differs from {copied}"
            )
        base_name = copied
    module, _, parameter = base_name.rpartition(".")
    if module not in modules or parameter not in dict(
        modules[module].named_parameters(recurse=False)
    ):
        adapted = modules.get(name.rsplit(".", 2)[0])
        return (
            "no such tensor" if adapted is None else f"{type(adapted).__name__} is not adapted here"
        )
    base = _parameter(modules, base_name).detach()
    if base.shape != tensor.shape:
        return str(tuple(base.shape))
    if base.is_meta:  # the base has no weights to compare with, and the copy is not used
        return None
    same = torch.equal(base.cpu().to(tensor.dtype), tensor) or torch.equal(
        base.cpu(), tensor.to(base.dtype)
    )
    return None if same else "the base's own values differ"


def group_by_layer(compared: Sequence[tuple[str, str, str]]) -> list[str]:
    """Formats (name, in the adapter, in the model) lines; lines that differ only by layer are
    merged.

    layers.0-23.self_attn.q_proj.lora_A   adapter (16, 1024)   model (16, 896)   24 tensors
    """
    groups: dict[tuple[str, str, str], list[int | None]] = {}
    for name, ours, theirs in compared:
        match = re.search(r"(?<=\.)\d+(?=\.)", name)
        template = name if match is None else f"{name[: match.start()]}#{name[match.end() :]}"
        groups.setdefault((template, ours, theirs), []).append(
            None if match is None else int(match[0])
        )
    rows = []
    for (template, ours, theirs), numbers in sorted(groups.items(), key=lambda group: group[0]):
        layers = ",".join(ranges(sorted(number for number in numbers if number is not None)))
        count = f"{len(numbers)} tensors" if len(numbers) > 1 else "1 tensor"
        rows.append((template.replace("#", layers, 1), f"adapter {ours}", f"model {theirs}", count))
    widths = [max(len(row[column]) for row in rows) for column in range(3)] if rows else []
    return [
        "   ".join(
            [*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), row[3]]
        )
        for row in rows
    ]
