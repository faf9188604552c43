"""Combining: what comes out is the weighted sum of the updates, whatever ranks, alphas and modules
went in."""

import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.helpers import fill
from tests.support.tiny import save_tiny, tiny_base
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.adapters.methods.lora import delta_weight
from veneer.bases.identity.fingerprint import Fingerprint
from veneer.errors import AdapterMismatchError, ConfigError, RefusedError
from veneer.formats.adapter import manifest_for, read_adapter, write_adapter
from veneer.formats.loading import load_adapter
from veneer.merge.combine.combine import Recipe, largest_entries
from veneer.merge.combine.combine_run import combine_adapters
from veneer.merge.combine.low_rank import cut_dense, cut_factors, relative_error
from veneer.models.load import load_base

EXACT = 1e-6  # float32 storage of factors computed in float64

# The faults of others that these rows are about: rank != alpha, rsLoRA, patterns, modules that one
# lacks.
SETTINGS = {
    "a": {"rank": 4, "alpha": 7, "targets": ["q_proj", "v_proj", "down_proj"]},
    "rslora": {"rank": 6, "alpha": 5, "rslora": True, "targets": ["v_proj", "up_proj"]},
    "patterns": {
        "rank": 3,
        "alpha": 11,
        "targets": ["q_proj", "v_proj", "o_proj"],
        "rank_pattern": {"layers.0.*v_proj": 5, "o_proj": 1},
        "alpha_pattern": {"q_proj": 2.5},
    },
    "embedding": {"rank": 4, "alpha": 7, "targets": ["embed_tokens", "v_proj"]},
    "experts": {
        "rank": 2,
        "alpha": 3,
        "rslora": True,
        "targets": ["gate_up_proj", "down_proj", "q_proj"],
    },
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {family: save_tiny(root / family, family) for family in ("llama_untied", "mixtral")}


def make(place, folder, settings, *, seed):
    base = load_base(str(folder))
    head = base.model.get_output_embeddings()
    made = attach(base.model, LoRA(**settings), name="x", routing=base.routing, head=head)
    fill(made.parameters().values(), seed=seed, scale=0.3)
    write_adapter(place, made, manifest_for(base, method="lora"), model=base.model)
    return place


def changes(adapter, folder):
    """Place -> dense update as the loaded adapter has it, float64."""
    base = load_base(str(folder))
    return {
        path: (delta_weight(layer)).double()
        for path, layer in load_adapter(base, adapter, name="x").layers.items()
    }


def weighted_sum(adapters, weights, folder):
    found = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for path, change in changes(adapter, folder).items():
            found[path] = found.get(path, 0) + weight * change
    return found


def assert_equal_updates(found, expected, tolerance=EXACT):
    assert found.keys() == expected.keys()
    for path, change in expected.items():
        assert (found[path] - change).norm() <= tolerance * change.norm(), path


GROUPS = [
    ("llama_untied", ["a", "rslora"], [1.0, 1.0]),
    ("llama_untied", ["a", "rslora", "patterns"], [0.7, -1.3, 2.0]),
    ("llama_untied", ["patterns", "embedding"], [-0.5, 0.25]),
    ("mixtral", ["experts", "experts"], [1.5, -0.5]),
]


@pytest.mark.parametrize("how", ["cat", "linear", "svd"])
@pytest.mark.parametrize(("family", "names", "weights"), GROUPS)
def test_cat_linear_and_svd_of_full_rank_are_the_weighted_sum(
    how, family, names, weights, bases, tmp_path
):
    adapters = [
        make(tmp_path / f"{n}{name}", bases[family], SETTINGS[name], seed=n)
        for n, name in enumerate(names)
    ]
    recipe = Recipe(how, rank=64 if how == "svd" else None)
    report = combine_adapters(
        list(zip(adapters, weights, strict=True)),
        recipe,
        base=str(bases[family]),
        out=tmp_path / "out",
    )
    assert_equal_updates(
        changes(tmp_path / "out", bases[family]), weighted_sum(adapters, weights, bases[family])
    )
    assert report.error <= EXACT
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (
        config["use_rslora"] is False
    )  # PEFT copies it with alpha = rank: too large by the root of the rank


@pytest.mark.parametrize("how", ["cat", "svd"])
def test_peft_loads_the_result_and_adds_the_same(how, bases, tmp_path):
    peft = pytest.importorskip("peft")
    adapters = [
        make(tmp_path / n, bases["llama_untied"], SETTINGS[n], seed=k)
        for k, n in enumerate(["a", "patterns"])
    ]
    combine_adapters(
        [(adapters[0], 0.7), (adapters[1], -1.3)],
        Recipe(how, rank=7 if how == "svd" else None),
        base=str(bases["llama_untied"]),
        out=tmp_path / "out",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(
            load_base(str(bases["llama_untied"])).model, tmp_path / "out"
        )
    found = {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").double()
        for name, module in theirs.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert_equal_updates(found, changes(tmp_path / "out", bases["llama_untied"]))


def test_an_adapter_less_itself_is_nothing(bases, tmp_path):
    adapter = make(tmp_path / "a", bases["llama_untied"], SETTINGS["a"], seed=1)
    report = combine_adapters(
        [(adapter, 1.0), (adapter, -1.0)],
        Recipe("linear"),
        base=str(bases["llama_untied"]),
        out=tmp_path / "out",
    )
    assert all(
        change.abs().max() < 1e-6
        for change in changes(tmp_path / "out", bases["llama_untied"]).values()
    )
    assert set(report.ranks.values()) <= {1, 2, 3, 4}


def test_linear_leaves_out_what_is_redundant(bases, tmp_path):
    adapter = make(tmp_path / "a", bases["llama_untied"], SETTINGS["a"], seed=1)
    report = combine_adapters(
        [(adapter, 1.0), (adapter, 0.5)],
        Recipe("linear"),
        base=str(bases["llama_untied"]),
        out=tmp_path / "out",
    )
    assert set(report.ranks.values()) == {4}
    assert report.error < 1e-6


def test_svd_is_the_best_at_its_rank_and_says_its_error(bases, tmp_path):
    adapters = [
        make(tmp_path / n, bases["llama_untied"], SETTINGS["a"], seed=k) for k, n in enumerate("xy")
    ]
    report = combine_adapters(
        [(adapters[0], 1.0), (adapters[1], 1.0)],
        Recipe("svd", rank=3),
        base=str(bases["llama_untied"]),
        out=tmp_path / "out",
    )
    wanted = weighted_sum(adapters, [1.0, 1.0], bases["llama_untied"])
    found = changes(tmp_path / "out", bases["llama_untied"])
    lost = sum((found[p] - wanted[p]).square().sum() for p in wanted)
    best = sum(torch.linalg.svdvals(wanted[p])[3:].square().sum() for p in wanted)
    whole = sum(wanted[p].square().sum() for p in wanted)
    assert float(lost) == pytest.approx(float(best), rel=1e-5)
    assert report.error == pytest.approx(float((best / whole).sqrt()), rel=1e-5)


def pruned_sum(how, adapters, weights, folder, density):
    """The definitions, entry by entry."""
    parts = [
        {
            path: change.T if "embed" in path else change
            for path, change in changes(a, folder).items()
        }
        for a in adapters
    ]
    found = {}
    for path in dict.fromkeys(p for part in parts for p in part):
        group = [(part[path], w) for part, w in zip(parts, weights, strict=True) if path in part]
        kept = []
        for change, weight in group:
            count = round(density * change.numel())
            order = change.abs().flatten().argsort(descending=True)[:count]
            mask = torch.zeros(change.numel()).index_fill_(0, order, 1.0).view_as(change)
            kept.append(weight * change * mask)
        stack = torch.stack(kept)
        if how == "magnitude":
            found[path] = stack.sum(0)
        else:
            sign = stack.sum(0).sign()
            agree = (stack.sign() == sign) & (stack != 0)
            found[path] = (stack * agree).sum(0) / agree.sum(0).clamp_min(1)
    return found


@pytest.mark.parametrize("how", ["magnitude", "ties"])
def test_pruning_follows_its_definition(how, bases, tmp_path):
    names = ["a", "patterns"]
    adapters = [
        make(tmp_path / n, bases["llama_untied"], SETTINGS[n], seed=k) for k, n in enumerate(names)
    ]
    report = combine_adapters(
        [(adapters[0], 1.0), (adapters[1], -0.5)],
        Recipe(how, rank=64, density=0.3),
        base=str(bases["llama_untied"]),
        out=tmp_path / "out",
    )
    expected = pruned_sum(how, adapters, [1.0, -0.5], bases["llama_untied"], 0.3)
    assert_equal_updates(changes(tmp_path / "out", bases["llama_untied"]), expected, 2e-6)
    assert report.error < 1e-6


def test_dare_is_right_on_average_and_repeatable(bases, tmp_path):
    adapter = make(
        tmp_path / "a",
        bases["llama_untied"],
        {"rank": 4, "alpha": 7, "targets": ["down_proj"]},
        seed=1,
    )

    def combined(seed):
        out = tmp_path / f"out{seed}{len(list(tmp_path.iterdir()))}"
        recipe = Recipe("dare", rank=64, density=0.5, seed=seed)
        combine_adapters([(adapter, 1.0)], recipe, base=str(bases["llama_untied"]), out=out)
        return changes(out, bases["llama_untied"])["model.layers.0.mlp.down_proj"]

    own = changes(adapter, bases["llama_untied"])["model.layers.0.mlp.down_proj"]
    runs = [combined(seed) for seed in range(12)]
    assert torch.equal(combined(3), runs[3]) and not torch.equal(runs[2], runs[3])
    for run in runs:
        small = run.abs() < 1e-4 * own.abs()
        assert 0.4 < small.double().mean() < 0.6
        assert torch.allclose(run[~small], 2 * own[~small], rtol=1e-3, atol=1e-5)
    mean = torch.stack(runs).mean(0)
    assert (mean * own).sum() / own.square().sum() == pytest.approx(1.0, abs=0.1)


def test_the_result_names_its_parents_and_its_recipe(bases, tmp_path):
    adapters = [
        make(tmp_path / n, bases["llama_untied"], SETTINGS["a"], seed=k) for k, n in enumerate("xy")
    ]
    combine_adapters(
        [(adapters[0], 1.0), (adapters[1], -0.5)],
        Recipe("svd", rank=4),
        base=str(bases["llama_untied"]),
        out=tmp_path / "out",
    )
    made, first = read_adapter(tmp_path / "out").manifest, read_adapter(adapters[0]).manifest
    assert [parent.weight for parent in made.parents] == [1.0, -0.5]
    assert made.parents[0].content_hash == first.content_hash
    assert made.base == first.base and made.tokenizer_hash == first.tokenizer_hash
    assert made.recipe == {"combine": {"how": "svd", "rank": 4, "density": None, "seed": None}}


def test_the_same_combination_is_the_same_to_the_byte(bases, tmp_path):
    adapters = [
        make(tmp_path / n, bases["llama_untied"], SETTINGS["a"], seed=k) for k, n in enumerate("xy")
    ]
    for out in ("one", "two"):
        combine_adapters(
            [(a, 1.0) for a in adapters],
            Recipe("ties"),
            base=str(bases["llama_untied"]),
            out=tmp_path / out,
        )
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert all(
        (tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files
    )


def test_one_that_an_earlier_version_wrote_does_not_stand_between_two_of_different_bases(
    bases, tmp_path
):
    other = save_tiny(tmp_path / "other", "llama_untied")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.01}))
    adapters = [
        make(tmp_path / name, base, SETTINGS["a"], seed=1)
        for name, base in (
            ("old", bases["llama_untied"]),
            ("x", bases["llama_untied"]),
            ("y", other),
        )
    ]
    file = adapters[0] / "veneer.json"
    manifest = json.loads(file.read_text())
    manifest["base"]["fingerprint"] = Fingerprint.from_dict(
        manifest["base"]["fingerprint"]
    ).earlier.to_dict()
    file.write_text(json.dumps(manifest))
    combine_adapters(
        [(adapter, 1.0) for adapter in adapters[:2]],
        Recipe("ties"),
        base=str(other),
        out=tmp_path / "both",
    )
    assert read_adapter(tmp_path / "both").manifest.base.fingerprint["values_hash"]
    with pytest.raises(
        AdapterMismatchError, match=r"x and \S+y: config.json rms_norm_eps: 1e-06 against 0.01"
    ):
        combine_adapters(
            [(adapter, 1.0) for adapter in adapters],
            Recipe("ties"),
            base=str(other),
            out=tmp_path / "out",
        )


def test_adapters_of_different_bases_are_refused(bases, tmp_path):
    one = make(tmp_path / "x", bases["llama_untied"], SETTINGS["a"], seed=1)
    other = make(
        tmp_path / "y", save_tiny(tmp_path / "other", "llama_untied", seed=5), SETTINGS["a"], seed=2
    )
    with pytest.raises(AdapterMismatchError, match="values of the weights"):
        combine_adapters(
            [(one, 1), (other, 1)],
            Recipe("cat"),
            base=str(bases["llama_untied"]),
            out=tmp_path / "o",
        )
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("field", ["tokenizer_hash", "template_hash"])
def test_adapters_that_were_trained_to_read_text_differently_are_refused(field, bases, tmp_path):
    """Each order of the two, and beside one that an earlier program wrote without the hash."""
    base, adapters = bases["llama_untied"], []
    for name, value in (("none", None), ("x", "a" * 64), ("y", "b" * 64)):
        adapters.append(make(tmp_path / name, base, SETTINGS["a"], seed=1))
        file = adapters[-1] / "veneer.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    for pair in (adapters[1:], adapters[:0:-1], adapters):
        with pytest.raises(AdapterMismatchError, match=r"a{12}") as told:
            combine_adapters(
                [(each, 1.0) for each in pair], Recipe("cat"), base=str(base), out=tmp_path / "out"
            )
        assert "b" * 12 in str(told.value)
    for name in "xy":
        pair = [(tmp_path / "none", 1.0), (tmp_path / name, 1.0)]
        combine_adapters(pair, Recipe("cat"), base=str(base), out=tmp_path / f"with {name}")
        known = json.loads((tmp_path / name / "veneer.json").read_text())[field]
        assert getattr(read_adapter(tmp_path / f"with {name}").manifest, field) == known


def test_trained_biases_are_refused(tmp_path):
    folder = save_tiny(tmp_path / "base", "phi")
    adapters = [
        make(
            tmp_path / n,
            folder,
            {"rank": 2, "alpha": 3, "targets": ["q_proj"], "bias": "all"},
            seed=k,
        )
        for k, n in enumerate("xy")
    ]
    with pytest.raises(RefusedError, match=r"trained biases\n.*veneer merge"):
        combine_adapters(
            [(a, 1.0) for a in adapters], Recipe("cat"), base=str(folder), out=tmp_path / "o"
        )


def test_a_trained_module_of_one_adapter_is_kept(bases, tmp_path):
    one = make(
        tmp_path / "x",
        bases["llama_untied"],
        {**SETTINGS["a"], "train_modules": ["lm_head"]},
        seed=1,
    )
    two = make(tmp_path / "y", bases["llama_untied"], SETTINGS["patterns"], seed=2)
    combine_adapters(
        [(one, 1.0), (two, 0.5)], Recipe("cat"), base=str(bases["llama_untied"]), out=tmp_path / "o"
    )
    base = load_base(str(bases["llama_untied"]))
    kept = load_adapter(base, tmp_path / "o", name="o").values["lm_head.weight"]
    assert torch.equal(kept, load_adapter(base, one, name="x").values["lm_head.weight"])


def test_updates_that_all_lie_in_modules_trained_in_full_are_no_adapter(bases, tmp_path):
    base, (q, v) = bases["llama_untied"], (f"layers.0.self_attn.{n}_proj" for n in "qv")
    adapters = [
        make(
            tmp_path / name,
            base,
            {"rank": 2, "alpha": 3, "targets": [own], "train_modules": [other]},
            seed=1,
        )
        for name, own, other in (("x", q, v), ("y", v, q))
    ]
    with pytest.raises(RefusedError, match=r"no low-rank update is left(.|\n)*veneer merge"):
        combine_adapters(
            [(a, 1.0) for a in adapters], Recipe("cat"), base=str(base), out=tmp_path / "o"
        )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"how": "cat", "rank": 3}, "keeps the exact sum"),
        ({"how": "svd", "density": 0.5}, "prunes nothing"),
        ({"how": "ties", "density": 0.0}, "above 0"),
        ({"how": "ties", "seed": 1}, "draws nothing"),
        ({"how": "svd", "rank": 0}, "from 1"),
    ],
)
def test_settings_that_nothing_would_read_are_refused(fields, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        combine_adapters([(tmp_path, 1.0)], Recipe(**fields), base="b", out=tmp_path / "o")


# the arithmetic


@given(
    st.integers(1, 9),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_cutting_factors_and_cutting_their_product_agree_with_svd(r, o, i, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(r, i, generator=generator, dtype=torch.float64)
    B = torch.randn(o, r, generator=generator, dtype=torch.float64)
    D = B @ A
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    k = min(rank, len(S))
    best = (U[:, :k] * S[:k]) @ Vh[:k]
    for cut in (cut_factors(A, B, rank), cut_dense(D, rank=rank)):
        assert torch.allclose(cut.B @ cut.A, best, atol=1e-6 * float(S[0]))
        assert relative_error(cut.lost, cut.whole) == pytest.approx(
            float(S[k:].square().sum() / S.square().sum()) ** 0.5, abs=2e-7
        )


def test_energy_chooses_the_lowest_rank_that_keeps_it():
    D = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])).repeat(1, 2)  # squares 32, 18, 8, 2 of 60
    assert cut_dense(D, energy=0.5).rank == 1
    assert cut_dense(D, energy=32 / 60 + 1e-6).rank == 2
    assert cut_dense(D, energy=0.99).rank == 4
    assert cut_dense(torch.zeros(3, 4), energy=0.9).A.abs().max() == 0


def test_largest_entries_are_of_each_matrix():
    stack = torch.stack(
        [torch.arange(1.0, 7.0).view(2, 3), 100 * torch.arange(1.0, 7.0).view(2, 3)]
    )
    kept = largest_entries(stack, 0.5)
    assert torch.equal((kept != 0).sum((1, 2)), torch.tensor([3, 3]))
    assert torch.equal(kept[0], torch.tensor([[0.0, 0.0, 0.0], [4.0, 5.0, 6.0]]))


def test_weights_of_the_base_are_not_read(bases, tmp_path):
    adapters = [
        make(tmp_path / n, bases["llama_untied"], SETTINGS["a"], seed=k) for k, n in enumerate("xy")
    ]
    folder = tmp_path / "config-only"
    folder.mkdir()
    (folder / "config.json").write_bytes((bases["llama_untied"] / "config.json").read_bytes())
    weights = (bases["llama_untied"] / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(weights[:8], "little")  # the shapes are read
    (folder / "model.safetensors").write_bytes(weights[:header] + b"\xff" * (len(weights) - header))
    report = combine_adapters(
        [(a, 1.0) for a in adapters], Recipe("cat"), base=str(folder), out=tmp_path / "o"
    )
    assert len(report.ranks) == 6
    assert tiny_base("llama_untied").model.config.num_hidden_layers == 2


def test_pruning_keeps_half_of_the_entries_where_nothing_is_said():
    assert Recipe("ties").kept_share == 0.5
    assert Recipe("ties", density=0.2).kept_share == 0.2
