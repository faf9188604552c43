"""Does a stored adapter fit a base? Every tensor that is missing, unexpected or misshapen, at once.

What PEFT would silently leave at its start or silently drop is a fault here.
Not known here: folders, fingerprints.
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
    magnitude_name,
    offset_name,
    slot_of,
    tables,
    tensor_names,
    value_name,
    wrappers,
)
from veneer.formats.peft.text_names import within_language_model
from veneer.linear import matrix_shape


def fit(
    config: PeftLoRA,
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    head: nn.Module | None,
    read_past: Collection[str],
) -> Fit:
    """Where a low-rank file goes on a base: layout.FileSettings.fit."""
    modules = plain_modules(model)
    own_head = None if head is None else unwrapped(head)
    head_path = next((path for path, module in modules.items() if module is own_head), None)
    config, tensors = within_language_model(config, tensors, modules)
    config, tensors = fuse_old_experts(config, tensors, modules)
    slots, tensors = _without_idle(
        _slots(config, tensors, modules, head_path), tensors, modules, read_past
    )
    trained, faults = _trained(config, modules)
    if not slots and not faults:
        faults = ["its targets match nothing in this model"]
    if faults:
        return Fit(None, faults=faults)
    if config.use_dora and (others := [slot.key for slot in slots if _is_no_linear(slot, modules)]):
        return Fit(
            None,
            faults=[f"DoRA of {path}, which is a stack of experts or a router" for path in others],
        )
    if config.lora_bias and (
        others := [slot.key for slot in slots if slot.kind != "linear" or slot.parameter]
    ):
        return Fit(
            None, faults=[f"lora_bias of {path}, which is no linear layer" for path in others]
        )
    strong = strengths(config, slots)
    settings = exact_settings(config, strong, trained)
    try:
        targets = find_targets(modules, settings, head=own_head, read_past=read_past)
    except ConfigError as fault:
        return Fit(None, faults=fault.faults)
    depth = {owner: len(group) for owner, group in wrappers(slots, modules).items()}
    replaced = [f"{path}.bias" for path in targets.biases]
    replaced += [
        f"{path}.{name}" for path in targets.trained for name, _ in modules[path].named_parameters()
    ]
    copies = {path: value_name(path, targets.trained, depth) for path in replaced}
    factors = tensor_names(slots, modules)
    expected: dict[str, tuple[int, ...]] = {}
    for slot in slots:
        expected |= dict(
            zip(factors[slot.path], factor_shapes(slot, strong[slot.path].rank), strict=True)
        )
        expected |= {magnitude_name(slot): (slot.out_features,)} if config.use_dora else {}
        expected |= (
            {offset_name(factors[slot.path]): (slot.out_features,)} if config.lora_bias else {}
        )
    expected |= {name: tuple(_parameter(modules, path).shape) for path, name in copies.items()}
    faults, concerned = _tensor_faults(tensors, expected, slots, modules, head_path)
    if faults:
        return Fit(None, faults=faults, concerned=concerned)
    scaling = {
        path: strength.scaling(rslora=config.use_rslora) for path, strength in strong.items()
    }
    values = {path: tensors[name] for path, name in copies.items()}
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
    ):  # PEFT's default for the architecture: the tensors tell which it was
        known = {slot.path for slot in slots}
        named = (slot_of(path, modules) for path in adapted_modules(tensors) if path not in known)
        slots += [slot for slot in named if slot is not None]
    return slots


def _is_no_linear(slot: Slot, modules: Modules) -> bool:
    return slot.kind == "experts" or matrix_shape(modules[slot.owner]) is not None


def _without_idle(
    slots: list[Slot], tensors: Mapping[str, Tensor], modules: Modules, read_past: Collection[str]
) -> tuple[list[Slot], Mapping[str, Tensor]]:
    """Without the zero updates of weights that the model takes past their modules.

    PEFT's all-linear puts factors there which no gradient ever reaches, so they are as they began:
    B is zero.
    """
    names = tensor_names(slots, modules)
    past = [s for s in slots if (s.key if s.parameter else f"{s.path}.weight") in read_past]
    pairs = {
        slot.path: [tensors[name] for name in names[slot.path] if name in tensors] for slot in past
    }
    idle = {
        path
        for path, pair in pairs.items()
        if len(pair) == 2 and not all(bool(t.any()) for t in pair)
    }
    gone = {name for path in idle for name in names[path]}
    kept = {name: tensor for name, tensor in tensors.items() if name not in gone}
    return [slot for slot in slots if slot.path not in idle], kept


def _trained(config: PeftLoRA, modules: Modules) -> tuple[list[str], list[str]]:
    """Fully trained modules without children, and what of the settings cannot be followed.

    PEFT compares endings of the string, not of the segments: "norm" also names input_layernorm.
    """
    trained: list[str] = []
    faults = []
    for entry in config.modules_to_save or []:
        named = [path for path in modules if path and path.endswith(entry)]
        if not named:
            faults.append(f"modules_to_save names {entry!r}, which the model does not have")
        for path in named:
            below = [p for p in modules if p == path or p.startswith(path + ".")]
            trained += [
                p
                for p in below
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
    frozen = tables(slots, head)
    for name in sorted(expected.keys() | tensors.keys()):
        found, wanted = tensors.get(name), expected.get(name)
        if found is None:
            compared.append((name, "missing", str(wanted)))
        elif wanted is None:
            if (fault := _extra_fault(name, found, tensors, frozen, modules)) is not None:
                compared.append((name, str(tuple(found.shape)), fault))
        elif tuple(found.shape) != wanted:
            compared.append((name, str(tuple(found.shape)), str(wanted)))
    return grouped(compared), len(compared)


def _extra_fault(
    name: str,
    found: Tensor,
    tensors: Mapping[str, Tensor],
    frozen: Mapping[str, str],
    modules: Modules,
) -> str | None:
    """PEFT adds copies of the base's own values to some files: they must be the base's own."""
    own = frozen.get(name, name)
    if (copied := re.sub(r"\.(original_module|modules_to_save)(\.[^.]+)$", r"\2", name)) != name:
        # beside a fully trained module, bias = "all" saves its frozen original and the trained copy
        # once more
        if "modules_to_save" in name.split(".")[-2:]:
            twin = tensors.get(copied)
            return (
                None if twin is not None and torch.equal(found, twin) else f"differs from {copied}"
            )
        own = copied
    module, _, parameter = own.rpartition(".")
    if module not in modules or parameter not in dict(
        modules[module].named_parameters(recurse=False)
    ):
        adapted = modules.get(name.rsplit(".", 2)[0])
        return (
            "no such tensor" if adapted is None else f"{type(adapted).__name__} is not adapted here"
        )
    base = _parameter(modules, own).detach()
    if base.shape != found.shape:
        return str(tuple(base.shape))
    if base.is_meta:  # the base's weights are not there to compare with, nor will this copy be used
        return None
    same = torch.equal(base.cpu().to(found.dtype), found) or torch.equal(
        base.cpu(), found.to(base.dtype)
    )
    return None if same else "the base's own values differ"


def grouped(compared: Sequence[tuple[str, str, str]]) -> list[str]:
    """(name, in the adapter, in the model) lines, those that differ in the layer's number alone as
    one.

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
        layers = _ranges([number for number in numbers if number is not None])
        count = f"{len(numbers)} tensors" if len(numbers) > 1 else "1 tensor"
        rows.append((template.replace("#", layers, 1), f"adapter {ours}", f"model {theirs}", count))
    widths = [max(len(row[column]) for row in rows) for column in range(3)] if rows else []
    return [
        "   ".join(
            [*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), row[3]]
        )
        for row in rows
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
