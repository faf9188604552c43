"""PEFT's prefix tuning loads what Veneer writes and answers the same; Veneer loads what PEFT
writes."""

import warnings

import numpy as np
import pytest
import torch

from tests.formats.test_prefix import CONFIG, IDS, WEIGHTS, logits, prefixed, written
from tests.support.tiny import tiny_base, tiny_model, tiny_tokenizer

peft = pytest.importorskip("peft")

from veneer.adapters.config import Prefix  # noqa: E402
from veneer.data.examples import Example, RowRef  # noqa: E402
from veneer.decoding.generate import generate  # noqa: E402
from veneer.formats.loading import load_adapter  # noqa: E402
from veneer.models.starts.initial_values import begin  # noqa: E402
from veneer.models.step import prepare  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
RELATIVE = 1e-5
FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "gpt2")
"""Grouped heads, head sizes that are not hidden / heads, sliding windows, soft caps, learned
positions."""


def assert_same(ours, theirs):
    assert (ours - theirs).abs().max() / theirs.abs().max() < RELATIVE


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_answers_the_same_with_our_files(tmp_path, family):
    base, attachment = prefixed(family)
    ours, path = logits(base), written(tmp_path, base, attachment).path
    theirs = peft.PeftModel.from_pretrained(tiny_model(family), path)
    with torch.no_grad():
        assert_same(ours, theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("projection", [False, True])
def test_we_answer_the_same_with_their_files(tmp_path, family, projection):
    torch.manual_seed(3)
    options = {"prefix_projection": True, "encoder_hidden_size": 7} if projection else {}
    theirs = peft.get_peft_model(
        tiny_model(family),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, **options),
    ).eval()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    base = tiny_base(family)
    prepare(base.model)
    load_adapter(base, tmp_path, name="a")
    base.routing.active = (("a", 1.0),)
    assert_same(logits(base), expected)


@pytest.mark.parametrize("frozen", [0, 1, 5])
def test_a_cartridge_of_theirs_answers_the_same(tmp_path, frozen):
    config = peft.CartridgeConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, num_frozen_tokens=frozen
    )
    theirs = peft.get_peft_model(tiny_model("qwen3"), config).eval()
    text = tiny_tokenizer().decode(range(97, 117))
    peft.initialize_kv_prefix_from_text(theirs, tiny_tokenizer(), text=text)
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    base = tiny_base("qwen3")
    prepare(base.model)
    attachment = load_adapter(base, tmp_path, name="a")
    assert attachment.config.frozen_tokens == frozen
    base.routing.active = (("a", 1.0),)
    assert_same(logits(base), expected)


def test_a_prefix_that_starts_from_a_text_is_the_cartridge_of_that_text(tmp_path):
    """The first tokens of the text that PEFT prefills, its template's markers included."""
    config = peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=9)
    theirs = peft.get_peft_model(tiny_model("llama"), config)
    tokenizer = tiny_tokenizer()
    table = peft.initialize_kv_prefix_from_text(theirs, tokenizer, text="Answer in letters.")
    turn = [{"role": "system", "content": "Answer in letters."}]
    text = tokenizer.apply_chat_template(turn, tokenize=False)
    ids = np.array(tokenizer(text)["input_ids"], dtype=np.int32)
    rows = [
        Example(np.append(ids, [n, n, n]), np.arange(len(ids) + 3) > len(ids), RowRef("r", n), n)
        for n in (1, 2)
    ]
    settings = Prefix(tokens=9, start="teacher", frozen_tokens=1)
    attachment = begin(tiny_base("llama"), settings, name="a", examples=rows).attachment
    (values,) = attachment.parameters().values()
    torch.testing.assert_close(values.detach(), table, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [None, 1])
def test_the_same_prefix_is_the_same_file_to_the_byte(tmp_path, frozen):
    base, attachment = prefixed("llama", frozen_tokens=frozen)
    ours = written(tmp_path, base, attachment).path
    base.model.config._name_or_path = base.name_or_path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(tiny_model("llama"), ours)
        theirs.save_pretrained(tmp_path / "theirs")
    assert (ours / WEIGHTS).read_bytes() == (tmp_path / "theirs" / WEIGHTS).read_bytes()
    assert (ours / CONFIG).read_text() == (tmp_path / "theirs" / CONFIG).read_text()


def test_greedy_answers_are_those_of_peft(tmp_path):
    """Against PEFT's forward: its generate gives other tokens than its own forward (0.21.2 on
    transformers 5.24)."""
    base, attachment = prefixed("llama_untied")
    path = written(tmp_path, base, attachment).path
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama_untied"), path).eval()
    ids = IDS[:1]
    (ours,) = generate(base, [ids[0].tolist()], max_new_tokens=10)
    assert len(ours) == 10
    for token in ours:
        with torch.no_grad():
            following = (
                theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].argmax()
            )
        assert following == token
        ids = torch.cat([ids, following.view(1, 1)], dim=1)
