"""A frozen causal LM with its tokenizer, its name and its fingerprint, and which adapters sit on
it.

The value that every folder from here up takes: formats put adapters on one, merge folds into one,
decoding answers by one. What people hold is the public Base (base.py): a FrozenBase too, which also
makes adapters, finds them in a library and answers, and therefore stands above those folders. It
knows nothing of how it was found (bases/names/sources.py) or of what an adapter computes
(adapters/).
"""

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
from veneer.execution.proofs.same_values import remember_by_values
from veneer.model_record import record_of
from veneer.models.step import ComputePaths, keep_paths, prepare
from veneer.models.weight_size import weight_size
from veneer.quant.config import Quantize
from veneer.sharded import Sharding


@dataclass(frozen=True)
class ReadPast:
    """Holds the weights that a model reads without calling their modules."""

    weights: frozenset[str]


@dataclass
class FrozenBase:
    """A causal LM in eval mode whose weights never train.

    source        as the user named it: a hub id, a folder, a .gguf file, a named default
    name_or_path  hub id or local folder: what an adapter's base_model_name_or_path says
    revision      the commit of a hub base; None for a local one
    quantize      the format its linear layers are held in; None: dense
    compute       the type its values are stored in, the one they are multiplied in, and which of
                  them they are held in; by default the model's
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
        """Returns the adapters on this base, by name."""
        return self.routing.attached

    def detach(self, name: str) -> None:
        """Removes an adapter. Without adapters, the model is as it was loaded, to the bit.

        Raises ConfigError if there is no such adapter, or if another thread or a `using` block
        uses it.
        """
        if name not in self.attachments:
            names = ", ".join(sorted(self.attachments)) or "none"
            raise ConfigError(f"no adapter named {name!r} is loaded", next_step=f"Loaded: {names}.")
        detach(self.model, name, routing=self.routing)

    @property
    def preamble(self) -> Preamble:
        """Returns the preamble that the active adapters were trained with."""
        return shared(adapter.preamble for adapter in self.routing.acting.adapters)

    @property
    def acting_tokenizer(self) -> PreTrainedTokenizerBase:
        """Returns the tokenizer with the new tokens of the active adapters."""
        texts = texts_of(self.routing.acting.adapters)
        if not texts:
            return self.tokenizer
        key = texts, self._tokenizer_state()
        cached = self._extended
        if cached is None or cached[0] != key:
            cached = self._extended = key, extended(self.tokenizer, texts)
        return cached[1]

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Returns the type of products and of what they give."""
        return self.compute.held if self.compute.narrow else self.model.dtype

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    @property
    def hidden_size(self) -> int:
        return hidden_size(self.config)

    @property
    def weight_rms(self) -> float:
        """Returns the root mean square of the weights of the linear layers, without the output
        head. All processes that share a sharded base ask for it together."""
        head = self.model.get_output_embeddings()
        return weight_size(self.model, head=head).root_mean_square

    def fingerprint(self) -> Fingerprint:
        """Returns the fingerprint of the weights as they were loaded, in their stored type.

        It stays the same when adapters add modules, full fine-tuning changes weights, or weights
        are widened to float32.
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
        return self.identity.weights_digest, *(
            fingerprint.weights_digest for fingerprint in earlier
        )

    def tokenizer_hash(self) -> str:
        """Returns the hash of the tokenizer's behaviour, computed once per state, as it reads the
        whole vocabulary."""
        state, cached = self._tokenizer_state(), self._tokenizer_hash
        if cached is None or cached[0] != state:
            cached = self._tokenizer_hash = state, tokenizer_hash(self.tokenizer)
        return cached[1]

    def _tokenizer_state(self) -> tuple[object, ...]:
        """Returns a key that changes with the tokenizer, its added tokens and their roles."""
        tokenizer = self.tokenizer
        added = tuple(
            sorted((number, str(token)) for number, token in tokenizer.added_tokens_decoder.items())
        )
        roles = tuple(
            sorted((role, str(token)) for role, token in tokenizer.special_tokens_map.items())
        )
        return tokenizer, len(tokenizer), added, roles

    def template_hash(self) -> str | None:
        """Returns the hash of the chat template's text; None without a template."""
        template = self.tokenizer.chat_template
        if template is None:
            return None
        if self._template_hash is None or self._template_hash[0] != template:
            copied = deepcopy(template)  # named templates are a dict, which may change in place
            self._template_hash = copied, ChatTemplate(self.tokenizer).fingerprint()
        return self._template_hash[1]

    @property
    def paths(self) -> ComputePaths:
        """Returns the fast paths that this model takes; proven on first use, with no adapter
        active."""

        def find() -> ComputePaths:
            with self.routing.none():
                paths = remember_by_values(
                    "paths", self.model, ComputePaths, lambda: prepare(self.model)
                )
                keep_paths(self.model, paths)
            return replace(paths, not_read=self.not_read)

        return record_of(self.model).part(ComputePaths, find)

    @property
    def read_past(self) -> frozenset[str]:
        """Returns the weights that the model reads without calling their modules; found on first
        use, with no adapter active."""

        def find() -> ReadPast:
            with self.routing.none():
                return ReadPast(
                    remember_by_values(
                        "past", self.model, frozenset[str], lambda: weights_read_past(self.model)
                    )
                )

        return record_of(self.model).part(ReadPast, find).weights


def hidden_size(config: PreTrainedConfig) -> int:
    """Returns the width of the hidden states."""
    return int(config.get_text_config().hidden_size)
