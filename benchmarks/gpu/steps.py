"""Random models of a given shape, and the project's own training step over them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.adapters.placement.routing import Routing
from veneer.data.examples import Example, RowRef
from veneer.execution.train_step import fused, replacements
from veneer.kernels.attention import packed as attention
from veneer.kernels.dense import loss
from veneer.linear import frozen_linear
from veneer.models.checkpointing import checkpointed
from veneer.models.step import prepare
from veneer.plan.estimate import estimate
from veneer.plan.simulation.dry_run import dry_run
from veneer.plan.simulation.step_counts import Step
from veneer.quant import nf4
from veneer.quant.layers import HeldLinear
from veneer.training.config import RunConfig
from veneer.training.inputs import TrainingInputs
from veneer.training.loop import Loop
from veneer.training.optimizer.buffer import FlatParameters
from veneer.training.output.screen import QuietScreen
from veneer.training.trainee import Trainee

METHOD = LoRA(rank=16, alpha=32.0)


@dataclass(frozen=True)
class Shape:
    """Of a Llama."""

    vocabulary: int
    hidden: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    @property
    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.feed_forward,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=32_768,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=0,
            architectures=["LlamaForCausalLM"],
        )


TINY = Shape(256, 64, 96, 2, 4, 2)


def random_model(
    shape: Shape, dtype: torch.dtype, device: torch.device, *, quantize: bool = False
) -> PreTrainedModel:
    """Frozen, in eval mode. quantize: its linear layers but the head in NF4."""
    torch.manual_seed(0)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(shape.config, dtype=dtype)
    model = model.eval().requires_grad_(False)
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()) if quantize else []:
        if isinstance(module, nn.Linear) and module is not head:
            packed = nf4.quantize(module.weight.detach())
            model.set_submodule(path, HeldLinear(packed, None, dtype=dtype))
    return model


def attention_case(
    shape: Shape, rows: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v and the gradient of the output."""
    draw = torch.Generator(device).manual_seed(0)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    sizes = [(rows, each, shape.head) for each in heads]
    q, k, v, grad = (torch.randn(size, generator=draw, device=device).to(dtype) for size in sizes)
    return q, k, v, grad


class Training:
    """LoRA over `model`: the loop of a run, its rows all of one length and alike in nothing."""

    def __init__(
        self, model: PreTrainedModel, *, rows: int, length: int, checkpointing: bool = False
    ) -> None:
        self.config, self.dtype, self.quantized = model.config, model.dtype, _packed(model)
        self.paths = prepare(model)
        routing = Routing()
        attachment = attach(
            model,
            METHOD,
            name="a",
            routing=routing,
            head=model.get_output_embeddings(),
            idle=self.paths.idle,
        )
        routing.active = (("a", 1.0),)
        self.rows = _rows(rows, length, model.config.vocab_size)
        self.checkpointing, self.model, self.routing = checkpointing, model, routing
        self.flat = FlatParameters(attachment.parameters(), attachment.learning_rate_factors())
        self.one_pass = replacements(model)
        settings: dict[str, Any] = {"base": "b", "data": "d", "out": "o", "batch": rows}
        settings |= {"checkpointing": checkpointing, "share_prompt": False}
        job = TrainingInputs(
            model=model,
            paths=self.paths,
            routing=routing,
            adapters=((attachment, 1.0),),
            flat=self.flat,
            train=self.rows,
            validation=(),
            config=RunConfig.model_validate(settings),
            learning_rate=1e-3,
            steps=1000,
            out=Path("nowhere"),
            sample=None,
        )
        self.records: list[dict[str, Any]] = []
        origin: Any = None
        records: Any = SimpleNamespace(write=self.records.append)
        trainee = Trainee(job, records, QuietScreen(), origin=origin, resume_from=None)
        self.loop = Loop([trainee])

    @staticmethod
    @contextmanager
    def settings(*, plain_attention: bool = False, loss_chunk: int | None = None) -> Iterator[None]:
        """Within the block the step computes these otherwise."""
        with ExitStack() as stack:
            if plain_attention:
                stack.enter_context(patch.object(attention, "declined", lambda *_: "not asked for"))
            if loss_chunk is not None:
                stack.enter_context(patch.object(loss, "CHUNK_ELSEWHERE", loss_chunk))
            yield

    def step(self) -> float:
        """Its loss."""
        with (
            fused(self.model, self.one_pass),
            checkpointed(self.model, self.routing, on=self.checkpointing),
        ):
            self.loop.step()
        return float(self.records[-1]["loss"])

    def values(self) -> torch.Tensor:
        return self.flat.values.detach().cpu().double()

    def flops_per_step(self) -> float:
        """Of products and attention, forward and backward: 4 per frozen weight and row, 6 per
        trained one; what is computed anew is not counted."""
        head = self.model.get_output_embeddings()
        rows = sum(len(row.ids) for row in self.rows)
        linear = [
            f for m in self.model.modules() if m is not head and (f := frozen_linear(m)) is not None
        ]
        weights = sum(f.in_features * f.out_features for f in linear)
        config = self.config
        width = config.num_attention_heads * config.head_dim
        scores = sum(len(row.ids) ** 2 for row in self.rows) / 2 * config.num_hidden_layers
        per_row = 4 * (weights + head.weight.numel()) + 6 * self.flat.values.numel()
        return per_row * rows + 3 * 4 * width * scores

    def planned_bytes(self, device: torch.device) -> int:
        step = Step(
            self.config,
            self.dtype,
            METHOD,
            self.rows,
            checkpointing=self.checkpointing,
            share_prompt=False,
            on_cpu=device.type != "cuda",
        )
        run = dry_run(step)
        run = run.in_four_bits() if self.quantized else run
        return estimate(run, device="cuda" if device.type == "cuda" else "cpu").peak_bytes


def _packed(model: PreTrainedModel) -> bool:
    return any(isinstance(module, HeldLinear) for module in model.modules())


def _rows(count: int, length: int, vocabulary: int) -> list[Example]:
    draw = np.random.default_rng(0)
    trained = np.ones(length, dtype=np.bool_)
    trained[0] = False
    made = []
    for number in range(count):
        ids = draw.integers(0, vocabulary, length, dtype=np.int32)
        made.append(Example(ids, trained, RowRef("random", number + 1), number))
    return made


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(
        models.BPE({letter: n for n, letter in enumerate(letters[: TINY.vocabulary])}, [])
    )
    made.pre_tokenizer, made.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token=letters[0]).save_pretrained(folder)
