"""What loading and unloading a name does: docs/serve.md, "Loading and unloading"."""

from dataclasses import dataclass, field

import pytest

from tests.serve.server import add_adapter, made_base
from veneer.errors import UnknownNameError
from veneer.library.library import Library
from veneer.library.residents.residents import Residents
from veneer.serve.engine.names import LOADED, UNLOADED, ModelNames
from veneer.serve.refusals import Refusal
from veneer.serve.start import ServeSettings, service_of

LIBRARY = {"bar": 2, "poems": 1}
"""Name -> the number of its versions, before anything happens."""


@dataclass(frozen=True)
class Load:
    name: str
    path: str
    in_place: bool = False

    def run(self, names, library):
        names.check(self.name, self.path, in_place=self.in_place)
        assert names.add(self.name, self.path, in_place=self.in_place) == LOADED.format(self.name)


@dataclass(frozen=True)
class Unload:
    name: str

    def run(self, names, library):
        assert names.remove(self.name) == UNLOADED.format(self.name)


@dataclass(frozen=True)
class Publish:
    name: str

    def run(self, names, library):
        library.add(library.path("poems"), name=self.name)


@dataclass(frozen=True)
class Remove:
    name: str

    def run(self, names, library):
        library.remove(self.name)


@dataclass(frozen=True)
class Row:
    """status: of the refusal that the operation ends with. means: name -> its version in the
    library; None: 404."""

    before: tuple = ()
    operation: Load | Unload = None
    status: int | None = None
    means: dict = field(default_factory=dict)
    listed: tuple = ("bar", "poems")


ALIAS = Load("mine", "bar@1")
SHADOWED = (Load("new", "bar@1"), Publish("new"))
SERVED = {"bar": "bar@2", "bar@1": "bar@1", "bar@2": "bar@2", "poems": "poems@1"}

TABLE = {
    # a published adapter
    "load itself": Row((), Load("bar", "bar"), means=SERVED),
    "load it by the base's name too": Row((), Load("tiny:bar", "bar"), means=SERVED),
    "load another under its name": Row((), Load("bar", "poems"), 409, SERVED),
    "load another under its name, in place": Row((), Load("bar", "poems", True), 409, SERVED),
    "load one of its versions under its name": Row((), Load("bar", "bar@1"), 409, SERVED),
    "unload it": Row(
        (), Unload("bar"), means={"bar": None, "bar@1": None, "tiny:bar": None}, listed=("poems",)
    ),
    "unload it by the base's name too": Row(
        (), Unload("tiny:bar"), means={"bar": None}, listed=("poems",)
    ),
    "unload one of its versions": Row((), Unload("bar@1"), 400, SERVED),
    "unload a version that is not there": Row((), Unload("bar@7"), 400, SERVED),
    "unload it beside its alias": Row(
        (ALIAS,),
        Unload("bar"),
        means={"bar": None, "bar@1": None, "mine": "bar@1"},
        listed=("mine", "poems"),
    ),
    # an unloaded one
    "load it again": Row((Unload("bar"),), Load("bar", "bar"), means=SERVED),
    "unload it again": Row((Unload("bar"),), Unload("bar"), 404, {"bar": None}, ("poems",)),
    "load it under another name": Row(
        (Unload("bar"),),
        ALIAS,
        means={"mine": "bar@1", "bar": None, "bar@1": None},
        listed=("mine", "poems"),
    ),
    # an alias
    "load a new alias": Row(
        (), ALIAS, means={**SERVED, "mine": "bar@1"}, listed=("bar", "mine", "poems")
    ),
    "load an alias again": Row(
        (ALIAS,), ALIAS, means={"mine": "bar@1"}, listed=("bar", "mine", "poems")
    ),
    "load another as the alias": Row(
        (ALIAS,), Load("mine", "poems"), 409, {"mine": "bar@1"}, ("bar", "mine", "poems")
    ),
    "load another as the alias, in place": Row(
        (ALIAS,),
        Load("mine", "poems", True),
        means={"mine": "poems@1"},
        listed=("bar", "mine", "poems"),
    ),
    "unload an alias": Row((ALIAS,), Unload("mine"), means={**SERVED, "mine": None}),
    "unload an alias by the base's name too": Row(
        (ALIAS,), Unload("tiny:mine"), means={**SERVED, "mine": None, "tiny:mine": None}
    ),
    "unload one of two aliases": Row(
        (ALIAS, Load("yours", "bar@1")),
        Unload("mine"),
        means={"yours": "bar@1"},
        listed=("bar", "poems", "yours"),
    ),
    "unload an alias of nothing": Row(
        (ALIAS, Remove("bar")), Unload("mine"), means={"mine": None}, listed=("poems",)
    ),
    "load an alias of an alias": Row(
        (ALIAS,), Load("yours", "mine"), 404, listed=("bar", "mine", "poems")
    ),
    # an alias, and an adapter that was published under the same name afterwards
    "ask for the name of both": Row(
        SHADOWED[:1],
        Publish("new"),
        means={"new": "bar@1", "new@1": "new@1"},
        listed=("bar", "new", "poems"),
    ),
    "load the published one": Row(
        SHADOWED, Load("new", "new"), 409, {"new": "bar@1"}, ("bar", "new", "poems")
    ),
    "load the published one, in place": Row(
        SHADOWED, Load("new", "new", True), means={"new": "new@1"}, listed=("bar", "new", "poems")
    ),
    "unload the alias before it": Row(
        SHADOWED, Unload("new"), means={"new": "new@1"}, listed=("bar", "new", "poems")
    ),
    "unload both": Row(
        (*SHADOWED, Unload("new")), Unload("new"), means={"new": None, "new@1": None}
    ),
    # the base, and nothing
    "unload the base": Row((), Unload("tiny"), 400, SERVED),
    "load an adapter as the base": Row((), Load("tiny", "bar"), 400, SERVED),
    "load an adapter as the base's adapter": Row((), Load("tiny:tiny", "bar"), 400, SERVED),
    "unload an adapter called like the base": Row(
        (Publish("tiny"),), Unload("tiny:tiny"), means={"tiny:tiny": None}
    ),
    "unload the base beside such an adapter": Row(
        (Publish("tiny"),),
        Unload("tiny"),
        400,
        {"tiny:tiny": "tiny@1"},
        ("bar", "poems", "tiny:tiny"),
    ),
    "unload nothing": Row((), Unload("nobody"), 404, SERVED),
    "unload what cannot be a name": Row((), Unload("../bar"), 400, SERVED),
}


@pytest.fixture(scope="module")
def base():
    return made_base()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    made = Library(folder / "library")
    for seed, name in enumerate(
        [name for name, versions in LIBRARY.items() for _ in range(versions)], 1
    ):
        add_adapter(made, folder / f"made-{seed}", name, seed)
    return sorted(folder.glob("made-*"))


@pytest.fixture
def library(tmp_path, folders):
    made = Library(tmp_path / "library")
    for folder, name in zip(
        folders, [name for name, n in LIBRARY.items() for _ in range(n)], strict=True
    ):
        made.add(folder, name=name)
    return made


@pytest.fixture
def residents(base, library):
    return Residents(base, library, budget_bytes=2**30)


@pytest.fixture
def names(library, residents):
    return ModelNames("tiny", library, residents)


def meaning(names, name):
    try:
        return names.entry(name).reference
    except Refusal as refusal:
        assert refusal.status == 404
        return None


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
def test_an_operation_on_a_name_does_what_the_page_says(names, library, row):
    for step in row.before:
        step.run(names, library)
    if row.status is None:
        row.operation.run(names, library)
    else:
        with pytest.raises(Refusal) as refused:
            row.operation.run(names, library)
        assert refused.value.status == row.status
    assert {name: meaning(names, name) for name in row.means} == row.means
    ids = [card["id"] for card in names.cards()]
    assert ids[0] == "tiny" and tuple(sorted(ids[1:])) == row.listed


def test_an_adapter_stays_pinned_when_its_alias_is_unloaded_and_not_when_it_is(
    names, library, residents
):
    def pinned():
        return sorted(shown.reference for shown in residents.tiers.shown() if shown.pinned)

    ALIAS.run(names, library)
    for reference in ("bar@1", "bar", "poems"):
        residents.pin(reference)
    assert pinned() == ["bar@1", "bar@2", "poems@1"]
    names.remove("mine")
    assert pinned() == ["bar@1", "bar@2", "poems@1"]
    ALIAS.run(names, library)
    names.remove("bar")
    assert pinned() == ["bar@1", "poems@1"]  # which the alias means
    names.remove("mine")
    assert pinned() == ["bar@1", "poems@1"]


@pytest.mark.parametrize("name", ["tiny", "tiny-llama"])  # the base's name, and its source
def test_the_base_s_name_is_the_base_and_an_adapter_of_that_name_is_itself(
    names, library, residents, name
):
    Publish(name).run(names, library)
    content = library.get(name).version.object
    listed = f"tiny:{name}" if name == "tiny" else name
    assert names.model("tiny").identity == ()
    for asked in (listed, f"tiny:{name}", f"{name}@1"):
        model = names.model(asked)
        assert (model.identity, model.adapters) == (((content, 1.0),), ((listed, content),))
    assert listed in [card["id"] for card in names.cards()]
    assert names.card("tiny")["parent"] is None and names.card(listed)["root"] == f"{name}@1"
    names.check("mine", name, in_place=False)
    names.add("mine", name)
    assert names.model("mine").identity == ((content, 1.0),)
    assert residents.load(name) == ((content, 1.0),)


def test_the_base_is_no_adapter(names, library):
    Publish("tiny").run(names, library)
    with pytest.raises(Refusal, match="tiny:tiny") as refused:
        names.entry("tiny")
    assert refused.value.status == 404
    with pytest.raises(Refusal, match="none is the base"):
        names.model("tiny", (("tiny", 1.0), ("bar", 1.0)))
    assert len(names.model("tiny", (("tiny:tiny", 1.0), ("bar", 1.0))).identity) == 2


@pytest.mark.parametrize("pinned", ["bar", "tiny:bar", "bar@1", "tiny:tiny", "tiny-llama"])
def test_a_pin_names_an_adapter_as_a_request_does(library, pinned):
    for name in ("tiny", "tiny-llama"):
        library.add(library.path("poems"), name=name)
    settings = ServeSettings(name="tiny", cache_bytes=2**20, pinned=[pinned])
    service = service_of(made_base(), library, settings)
    (shown,) = service.residents.tiers.shown()
    own = library.get(pinned.removeprefix("tiny:"))
    assert (shown.reference, shown.pinned) == (own.reference, True)
    service.prompts.close()


@pytest.mark.parametrize("pinned", ["tiny", "nobody", "other:bar"])
def test_a_pin_of_no_adapter_is_refused(library, pinned):
    settings = ServeSettings(name="tiny", cache_bytes=2**20, pinned=[pinned])
    with pytest.raises(UnknownNameError, match=pinned):
        service_of(made_base(), library, settings)


@pytest.mark.parametrize(
    ("before", "name", "hint"),
    [
        ((), "poem", "Did you mean 'poems'?"),
        ((), "tinny", "Did you mean 'tiny'?"),
        ((ALIAS,), "mines", "Did you mean 'mine'?"),
        ((), "xyz", "There is: bar, poems, tiny."),
        ((Unload("poems"),), "poem", "There is: bar, tiny."),
    ],
)
def test_an_unknown_model_is_told_with_the_name_that_was_meant(names, library, before, name, hint):
    for step in before:
        step.run(names, library)
    with pytest.raises(Refusal) as refused:
        names.model(name)
    assert refused.value.status == 404 and refused.value.message.endswith(f"does not exist. {hint}")
