"""A frozen causal LM with its tokenizer, its name and its fingerprint, and which adapters sit on
it.

The value that every room from here up takes: formats put adapters on one, merge folds into one,
decoding answers by one. What people hold is the public Base (base.py): a FrozenBase too, which also
makes adapters, finds them in a library and answers, and therefore stands above those rooms. It
knows nothing of how it was found (bases/names/sources.py) or of what an adapter computes
(adapters/).
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from veneer.adapters.attach import detach
from veneer.adapters.methods.new_tokens import texts_of
from veneer.adapters.placement.attachment import Attachment
from veneer.adapters.placement.reads import weights_read_past
from veneer.adapters.placement.routing import Routing
from veneer.adapters.preamble import Preamble, shared
from veneer.bases.compute import Compute
from veneer.bases.identity.fingerprint import Fingerprint, fingerprint, tokenizer_hash
from veneer.data.template.new_tokens import extended
from veneer.data.template.template import ChatTemplate
from veneer.errors import ConfigError
from veneer.execution.proofs.same_values import same_values
from veneer.model_record import record_of
from veneer.models.step import ComputePaths, keep_paths, prepare
from veneer.quant.config import Quantize
from veneer.sharded import Sharding


@dataclass(frozen=True)
class ReadPast:
    """The weights that a model takes past their modules."""

    weights: frozenset[str]


@dataclass
class FrozenBase:
    """A causal LM in eval mode whose weights never train.

    source        as the user named it: a hub id, a folder, a .gguf file, a named default
    name_or_path  hub id or local folder: what an adapter's base_model_name_or_path says
    revision      the commit of a hub base; None for a local one
    quantize      the format its linear layers are held in; None: dense
    compute       the type its values are stored in, and the one they are held and multiplied in; by
                  default the model's
    identity      its fingerprint as it was read, before anything was widened; by default the
                  model's as it stands
    as_held       what versions that did not widen wrote of a base loaded in float32: the
                  fingerprint of the values as they are held, without the fields that those versions
                  did not know
    routing       the adapters on this base, and which of them act
    sharding      how several processes hold it together; None: this one holds all of it
    not_read        what its files hold beside the text that is read
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    name_or_path: str
    revision: str | None = None
    quantize: Quantize | None = None
    compute: Compute = None  # type: ignore[assignment]
    identity: Fingerprint = field(default=None, repr=False)  # type: ignore[assignment]
    as_held: Fingerprint | None = field(default=None, repr=False)
    routing: Routing = field(default_factory=Routing)
    sharding: Sharding | None = field(default=None, repr=False)
    not_read: tuple[str, ...] = ()
    _tokenizer_hash: tuple[object, str] | None = field(default=None, init=False, repr=False)
    _template_hash: tuple[object, str] | None = field(default=None, init=False, repr=False)
    _extended: tuple[object, PreTrainedTokenizerBase] | None = field(
        default=None, init=False, repr=False
    )

    def __post_init__(self) -> None:
        self.identity = self.identity or fingerprint(self.model)
        self.compute = self.compute or Compute(self.model.dtype, self.model.dtype)

    @property
    def attachments(self) -> dict[str, Attachment]:
        """The adapters on this base, by name."""
        return self.routing.attached

    def detach(self, name: str) -> None:
        """Take an adapter away. Removing the last one leaves the model as it was loaded, to the
        bit.

        ConfigError: there is none of that name, or another thread or a block around this one uses
        it; it stays then.
        """
        if name not in self.attachments:
            known = ", ".join(sorted(self.attachments)) or "none"
            raise ConfigError(
                f"no adapter named {name!r} is loaded", next_step=f"There is: {known}."
            )
        detach(self.model, name, routing=self.routing)

    @property
    def preamble(self) -> Preamble:
        """Of the conversations that what acts now was trained on."""
        return shared(adapter.preamble for adapter in self.routing.acting.adapters)

    @property
    def acting_tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, with the tokens that what acts now brings."""
        texts = texts_of(self.routing.acting.adapters)
        if not texts:
            return self.tokenizer
        key = texts, self._tokenizer_state()
        known = self._extended
        if known is None or known[0] != key:
            known = self._extended = key, extended(self.tokenizer, texts)
        return known[1]

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    def fingerprint(self) -> Fingerprint:
        """Which weights these are, taken when the base was made, in the type they are stored in.

        Adapters add modules, full fine-tuning changes weights in place, and widening to float32
        keeps every value: the answer stays that of the base the user loaded.
        """
        return self.identity

    def is_named_by(self, stored: Fingerprint) -> bool:
        """True if a file that holds this fingerprint was made for this base."""
        if stored.is_earlier and self.as_held is not None and not stored.differences(self.as_held):
            return True
        return not stored.differences(self.identity)

    @property
    def weights_digests(self) -> tuple[str, ...]:
        """Returns the digests that this and earlier versions of Veneer write for this base into a
        library."""
        earlier = [self.identity.earlier] + ([] if self.as_held is None else [self.as_held.earlier])
        return self.identity.weights_digest, *(each.weights_digest for each in earlier)

    def tokenizer_hash(self) -> str:
        """Returns the hash of what the tokenizer does, computed once per state: it reads the whole
        vocabulary."""
        state, known = self._tokenizer_state(), self._tokenizer_hash
        if known is None or known[0] != state:
            known = self._tokenizer_hash = state, tokenizer_hash(self.tokenizer)
        return known[1]

    def _tokenizer_state(self) -> tuple[object, ...]:
        """Another one for another tokenizer, or where tokens were added to it or given other
        roles."""
        tokenizer = self.tokenizer
        added = tuple(
            sorted((number, str(token)) for number, token in tokenizer.added_tokens_decoder.items())
        )
        roles = tuple(
            sorted((role, str(token)) for role, token in tokenizer.special_tokens_map.items())
        )
        return tokenizer, len(tokenizer), added, roles

    def template_hash(self) -> str | None:
        """Of its chat template's text; None where it has none."""
        template = self.tokenizer.chat_template
        if template is None:
            return None
        if self._template_hash is None or self._template_hash[0] != template:
            own = deepcopy(template)  # named templates are a dict, which may be changed in place
            self._template_hash = own, ChatTemplate(self.tokenizer).fingerprint()
        return self._template_hash[1]

    @property
    def paths(self) -> ComputePaths:
        """Which fast paths this model takes; proven on its first use, with no adapter acting."""

        def find() -> ComputePaths:
            with self.routing.none():
                paths = same_values("paths", self.model, ComputePaths, lambda: prepare(self.model))
                keep_paths(self.model, paths)
            return replace(paths, not_read=self.not_read)

        return record_of(self.model).part(ComputePaths, find)

    @property
    def read_past(self) -> frozenset[str]:
        """Weights that the model takes past their modules; asked of it once, with no adapter
        acting."""

        def find() -> ReadPast:
            with self.routing.none():
                return ReadPast(
                    same_values(
                        "past", self.model, frozenset[str], lambda: weights_read_past(self.model)
                    )
                )

        return record_of(self.model).part(ReadPast, find).weights


def hidden_size(config: PreTrainedConfig) -> int:
    """Width of what the decoder layers of such a base hand on."""
    return int(config.get_text_config().hidden_size)
