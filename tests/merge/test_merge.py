"""Merging: the written folder answers as the adapter on its base did, for every option an adapter
can have."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.families.models import save_family
from tests.parity.test_peft_files import IDS, ROWS, answers, logits, ours
from tests.support.helpers import fill, merge_in_memory
from tests.support.merging import NAME, adapted, plain_load, written_adapter
from tests.support.tiny import save_tiny, tiny_base
from veneer.adapters.attach import attach
from veneer.adapters.config import Bottleneck, DoRA, LoRA
from veneer.errors import ConfigError, RefusedError
from veneer.formats import loading
from veneer.formats.adapter import manifest_for, write_adapter
from veneer.merge.fold.folder import _FileLayout, merge_into_folder
from veneer.merge.fold.in_memory import merged_weights
from veneer.merge.fold.merge_run import merge_adapters
from veneer.models.load import load_base

RELATIVE = (
    2e-5  # float32: W + D multiplied once against W and D multiplied apart, through two layers
)

MERGED_ROWS = {name: row for name, row in ROWS.items() if name != "activation"}
every_merged_row = pytest.mark.parametrize("row", MERGED_ROWS.values(), ids=MERGED_ROWS.keys())


@every_merged_row
def test_the_folder_answers_as_the_adapter_did(row, tmp_path):
    base, _ = ours(row)
    expected, plain = answers(base, NAME), logits(base.model)
    report = merge_into_folder(base, [(NAME, 1.0)], tmp_path / "merged")
    found = logits(plain_load(tmp_path / "merged"))
    assert (expected - plain).abs().max() > 0.1 * plain.abs().max(), "the adapter must matter"
    assert (found - expected).abs().max() <= RELATIVE * expected.abs().max()
    assert (
        report.logits is not None
        and report.logits.max_difference <= RELATIVE * expected.abs().max()
    )
    assert report.total.share == pytest.approx(1.0, abs=1e-5)
    assert report.total.relative_size > 0.01


@every_merged_row
def test_merging_in_memory_and_back_leaves_every_bit_and_every_object(row):
    base, attachment = ours(row)
    expected, plain = answers(base, NAME), logits(base.model)
    before = dict(base.model.named_parameters(remove_duplicate=False))
    bits = {name: p.clone() for name, p in before.items()}
    merged = merge_in_memory(base.model, [(attachment, 1.0)])
    assert (logits(base.model) - expected).abs().max() <= RELATIVE * expected.abs().max()
    merged.restore()
    after = dict(base.model.named_parameters(remove_duplicate=False))
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert all(torch.equal(after[name], bits[name]) for name in bits)
    assert torch.equal(logits(base.model), plain)


@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_the_change_of_an_embedding_comes_on_top_of_one_that_another_adapter_trained_in_full(
    method, tmp_path
):
    import veneer

    base = veneer.load(str(save_tiny(tmp_path / "base", "llama_untied")))
    trained = base.attach(
        LoRA(rank=2, targets=["q_proj"], train_modules=["embed_tokens"]), name="a"
    )
    changed = base.attach(method(rank=3, alpha=5, targets=["embed_tokens"]), name="b")
    for attachment in (trained, changed):
        for seed, parameter in enumerate(attachment.parameters().values()):
            generator = torch.Generator().manual_seed(seed)
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    base.use(["a", "b"])
    expected = logits(base.model)
    base.merge(["a", "b"])
    assert (logits(base.model) - expected).abs().max() <= RELATIVE * expected.abs().max()


def test_a_base_merges_and_unmerges_by_name(tmp_path):
    import veneer

    base = veneer.load(str(save_tiny(tmp_path / "base", "llama")))
    plain = logits(base.model)
    attachment = base.attach(LoRA(rank=4, alpha=7), name="a")
    fill(attachment.parameters().values(), scale=0.2)
    base.use("a")
    expected = logits(base.model)
    base.merge("a")
    assert (logits(base.model) - expected).abs().max() <= RELATIVE * expected.abs().max()
    with pytest.raises(ConfigError, match=r"unmerge\(\)"):
        base.use("a")
    with pytest.raises(ConfigError, match=r"unmerge\(\)"):
        base.merge("a")
    with pytest.raises(ConfigError, match=r"unmerge\(\)"):
        base.attach(LoRA(rank=2), name="b")  # its start could rest on the merged weights
    with pytest.raises(ConfigError, match=r"unmerge\(\)"):
        base.load_adapter(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"unmerge\(\)"):
        base.pin("of_the_library")
    with pytest.raises(ConfigError, match="needs the name of an adapter"):
        base.merge([])  # it would forget the originals
    base.unmerge()
    base.unmerge()
    assert torch.equal(logits(base.model), plain)
    base.use("a")
    assert torch.equal(logits(base.model), expected)


def test_what_is_refused_changes_nothing_of_what_acts(tmp_path, monkeypatch):
    import veneer

    base = veneer.load(str(save_tiny(tmp_path / "base", "llama")))
    for name in "abc":
        method = Bottleneck(size=4) if name == "c" else LoRA(rank=4, alpha=7)
        fill(base.attach(method, name=name).parameters().values(), scale=0.2)
    stored = tmp_path / "b"
    write_adapter(
        stored, base.attachments["b"], manifest_for(base, method="lora"), model=base.model
    )
    with torch.no_grad():
        next(iter(base.attachments["b"].layers.values())).B.fill_(3e38)
    base.use(["a", "c"], [1.0, 0.5])
    expected, active = logits(base.model), base.routing.active
    modules = dict(base.model.named_modules())

    def broken(*_args, **_names):
        raise MemoryError

    refused = [
        (RefusedError, lambda: base.merge(["a", "c"])),  # no change of weights
        (RefusedError, lambda: base.merge(["a", "b"])),  # not finite
        (ConfigError, lambda: base.merge(["a", "nobody"])),
        (ConfigError, lambda: base.merge("a", [1.0, 2.0])),
        (ConfigError, lambda: base.use("a", [float("nan")])),
        (ConfigError, lambda: base.use(["b", "nobody"])),
        (ConfigError, lambda: base.detach("nobody")),
        (ConfigError, lambda: base.pin("a", "nobody")),
        (ConfigError, lambda: base.attach(LoRA(rank=2), name="a")),
        (ConfigError, lambda: base.attach(LoRA(rank=2, targets=["nothing"]), name="d")),
        (ConfigError, lambda: base.load_adapter(stored, name="a")),
    ]
    for error, attempt in refused:
        with pytest.raises(error):
            attempt()
        assert base.routing.active == active and torch.equal(logits(base.model), expected)
    with base.using("a"), pytest.raises(ConfigError, match="is in use"):
        base.merge("a")  # behind the block what acted before would act on merged weights
    with base.using("a"), base.using("b"), pytest.raises(ConfigError, match="a block around"):
        base.detach("a")
    monkeypatch.setattr(loading, "_fill", broken)
    with pytest.raises(MemoryError):
        base.load_adapter(stored, name="d")
    assert dict(base.model.named_modules()) == modules and set(base.attachments) == set("abc")
    assert not base._pool._loaded["a"].pinned and torch.equal(logits(base.model), expected)


def test_an_adapter_that_is_detached_within_a_block_does_not_act_again_under_its_name_behind_it(
    tmp_path,
):
    import veneer

    base = veneer.load(str(save_tiny(tmp_path / "base", "llama")))
    for name in "ab":
        base.attach(LoRA(rank=2), name=name)
    base.use("a")
    with base.using("b"):
        base.detach("a")
    fill(base.attach(LoRA(rank=2), name="a").parameters().values())
    assert base.routing.active == ()


def test_a_merge_that_is_interrupted_leaves_the_base():
    base, attachment = ours(ROWS[next(iter(ROWS))])
    plain = logits(base.model)
    merged = merged_weights(base.model, [(attachment, 1.0)])

    class Stop(dict):
        def __setitem__(self, name, value):
            if value is merged.changed[-1][2]:
                raise KeyboardInterrupt
            super().__setitem__(name, value)

    last = merged.changed[-1][0]
    last._parameters = Stop(last._parameters)
    with pytest.raises(KeyboardInterrupt):
        merged.install()
    assert torch.equal(logits(base.model), plain)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"]])
def test_a_tied_embedding_is_untied_when_only_one_side_changed(targets, tmp_path):
    """PEFT's merge changes the head with the embedding: another model than the one that was
    trained."""
    base = adapted("llama", settings={"targets": [*targets, "v_proj"]})
    expected = answers(base, NAME)
    report = merge_into_folder(base, [(NAME, 1.0)], tmp_path / "m")
    assert report.untied
    assert json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"] is False
    stored = load_file(tmp_path / "m" / "model.safetensors")
    assert not torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    assert (
        logits(plain_load(tmp_path / "m")) - expected
    ).abs().max() <= RELATIVE * expected.abs().max()


def test_a_tied_model_stays_tied_where_neither_side_changed(tmp_path):
    report = merge_into_folder(adapted("llama"), [(NAME, 1.0)], tmp_path / "m")
    assert not report.untied
    assert "lm_head.weight" not in load_file(tmp_path / "m" / "model.safetensors")
    assert plain_load(tmp_path / "m").config.tie_word_embeddings is True


def test_a_block_that_stands_in_several_layers_becomes_a_block_of_each(tmp_path):
    """Zamba: one field of its config ties the layers' common block and the output head."""
    base = load_base(str(save_family("zamba", tmp_path / "base")))
    head = base.model.get_output_embeddings()
    attachment = attach(base.model, LoRA(rank=2), name=NAME, routing=base.routing, head=head)
    fill(attachment.parameters().values())
    base.routing.active = ((NAME, 1.0),)
    ids = IDS % len(base.model.get_input_embeddings().weight)
    expected = base.model(ids).logits
    assert merge_into_folder(base, [(NAME, 1.0)], tmp_path / "m").untied
    found = plain_load(tmp_path / "m")(ids).logits
    assert (found - expected).abs().max() <= RELATIVE * expected.abs().max()


def test_untouched_weights_are_the_base_s_to_the_bit(tmp_path):
    base = adapted("llama_untied", torch.bfloat16, settings={"targets": ["v_proj"]})
    own = {name: p.clone() for name, p in base.model.state_dict().items()}
    merge_into_folder(base, [(NAME, 1.0)], tmp_path / "m")
    stored = load_file(tmp_path / "m" / "model.safetensors")
    kept = [name for name in own if "v_proj" not in name]
    assert len(kept) > 10 and all(torch.equal(stored[name], own[name]) for name in kept)


def test_the_folder_has_tokenizer_template_and_generation_config(tmp_path):
    base = load_base(str(save_tiny(tmp_path / "base", "llama")))
    attachment = attach(
        base.model, LoRA(rank=2, alpha=3), name=NAME, routing=base.routing, head=None
    )
    fill(attachment.parameters().values(), scale=0.2)
    stops = base.model.generation_config.eos_token_id
    merge_into_folder(base, [(NAME, 1.0)], tmp_path / "m")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    turns = [{"role": "user", "content": "naïve  café"}]
    assert tokenizer.apply_chat_template(
        turns, tokenize=False
    ) == base.tokenizer.apply_chat_template(turns, tokenize=False)
    assert plain_load(tmp_path / "m").generation_config.eos_token_id == stops
    again = load_base(str(tmp_path / "m"))
    assert again.fingerprint().architecture == base.fingerprint().architecture


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_shards_hold_what_one_file_would(family, tmp_path):
    one, many = (adapted(family) for _ in range(2))
    merge_into_folder(one, [(NAME, 1.0)], tmp_path / "one")
    merge_into_folder(many, [(NAME, 1.0)], tmp_path / "many", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert len(set(index["weight_map"].values())) > 3
    assert index["weight_map"].keys() == whole.keys()
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "many" / file, framework="pt") as shard:
            assert torch.equal(shard.get_tensor(name), whole[name])
    assert torch.equal(logits(plain_load(tmp_path / "many")), logits(plain_load(tmp_path / "one")))


def test_experts_are_written_one_by_one_as_transformers_stores_them(tmp_path):
    merge_into_folder(adapted("mixtral"), [(NAME, 1.0)], tmp_path / "m")
    names = load_file(tmp_path / "m" / "model.safetensors")
    tiny_base("mixtral").model.save_pretrained(tmp_path / "theirs")
    assert names.keys() == load_file(tmp_path / "theirs" / "model.safetensors").keys()


def test_weights_are_written_a_layer_at_a_time_and_what_is_in_no_layer_alone():
    names = [
        "embed",
        "a.layers.1.q",
        "b.layers.1.q",
        "a.layers.10.q",
        "a.layers.1.mlp.3.up",
        "norm",
    ]
    plan = SimpleNamespace(stored=dict.fromkeys(names))
    assert list(_FileLayout._layers(plan)) == [
        ["embed"],
        ["a.layers.1.q", "a.layers.1.mlp.3.up"],
        ["b.layers.1.q"],
        ["a.layers.10.q"],
        ["norm"],
    ]


def test_several_adapters_add_up_with_their_weights(tmp_path):
    base = adapted("llama_untied", settings={"targets": ["q_proj", "v_proj"]})
    second = attach(
        base.model,
        LoRA(rank=3, alpha=5, rslora=True, targets=["v_proj", "up_proj"]),
        name="b",
        routing=base.routing,
        head=None,
        seed=3,
    )
    fill(second.parameters().values(), seed=9, scale=0.2)
    base.routing.active = ((NAME, 0.5), ("b", -0.75))
    expected = logits(base.model)
    merge_into_folder(base, [(NAME, 0.5), ("b", -0.75)], tmp_path / "m")
    assert (
        logits(plain_load(tmp_path / "m")) - expected
    ).abs().max() <= RELATIVE * expected.abs().max()


def test_the_changes_of_values_trained_in_full_add_up_with_their_weights(tmp_path):
    settings = {"targets": ["q_proj"], "train_modules": ["lm_head", "norm", "o_proj"]}
    base = adapted("llama_untied", settings=settings)
    head = base.model.get_output_embeddings()
    second = attach(base.model, LoRA(rank=2, **settings), name="b", routing=base.routing, head=head)
    fill(second.parameters().values(), seed=9, scale=0.2)
    plain = base.model.get_parameter("lm_head.base.weight").clone()
    values = [
        adapter.values["lm_head.weight"].clone() for adapter in (base.attachments[NAME], second)
    ]
    base.routing.active = ((NAME, 0.5), ("b", -0.75))
    expected = logits(base.model)
    merge_into_folder(base, [(NAME, 0.5), ("b", -0.75)], tmp_path / "m")
    merged = plain_load(tmp_path / "m")
    assert (logits(merged) - expected).abs().max() <= RELATIVE * expected.abs().max()
    summed = plain + 0.5 * (values[0] - plain) - 0.75 * (values[1] - plain)
    torch.testing.assert_close(merged.lm_head.weight, summed)


def test_from_folders_to_a_folder_with_a_record_of_what_was_merged(tmp_path):
    folder = save_tiny(tmp_path / "base", "llama")
    base = adapted("llama")
    place = written_adapter(folder, base, tmp_path / "a")
    report = merge_adapters(str(folder), [(place, 1.0)], out=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "veneer_merge.json").read_text())
    manifest = json.loads((place / "veneer.json").read_text())
    assert record["adapters"] == [{"content_hash": manifest["content_hash"], "weight": 1.0}]
    assert record["base"]["fingerprint"] == manifest["base"]["fingerprint"]
    assert record["survival"]["survival"] == report.total.share
    assert (logits(plain_load(tmp_path / "out")) - answers(base, NAME)).abs().max() < 1e-3


def test_a_folder_that_exists_is_not_overwritten(tmp_path):
    (tmp_path / "m").mkdir()
    with pytest.raises(ConfigError, match="exists"):
        merge_into_folder(adapted("llama"), [(NAME, 1.0)], tmp_path / "m")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"quantize": "nf4"}, "give --into original or --into dequantised"),
        ({"quantize": "nf4", "into": "dequantised", "original": "x"}, "only with --into original"),
    ],
)
def test_what_is_merged_into_must_be_said_over_a_quantised_base_and_only_there(
    asked, said, tmp_path
):
    with pytest.raises(ConfigError, match=said):
        merge_adapters("base", [(tmp_path, 1.0)], out=tmp_path / "out", **asked)
