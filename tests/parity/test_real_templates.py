"""Chat templates of published models, where the package that brings them along is installed (trl;
nothing of it runs): ids and masks equal a brute-force rendering, with reasoning and without, over
several turns, with tools."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.models.reasoning import check_by_brute_force

_PACKAGE = find_spec("trl")
FOLDER = (
    Path(str(_PACKAGE.origin)).parent / "chat_templates" if _PACKAGE is not None else Path("none")
)
FILES = [path for path in sorted(FOLDER.glob("*.jinja")) if not path.stem.endswith("_training")]


@pytest.mark.skipif(not FILES, reason="trl is not installed")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_published_template_is_learnt_exactly_or_refused(file: Path) -> None:
    found = check_by_brute_force(file.read_text(encoding="utf-8"))
    assert found["learnt"] or set(found) <= {"D201", "D202", "D214"}
    print(dict(found))
