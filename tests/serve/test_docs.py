"""docs/serve.md says what the code does."""

import json
import re

import pytest

from tests.serve.server import BASE, add_adapter, running
from tests.serve.tables import PAGE, filled
from veneer.library.library import Library
from veneer.serve.http.paths import BODIES, PATHS, openapi


def test_the_tables_are_those_of_the_code():
    assert filled(PAGE.read_text()) == PAGE.read_text(), (
        "python -m tests.serve.tables writes them anew"
    )


def test_every_path_is_named():
    text = PAGE.read_text()
    assert [path for path in PATHS if path not in text] == []


def test_the_openapi_document_requires_a_body_on_every_path_and_defines_its_fields():
    document = openapi()
    schemas = document["components"]["schemas"]
    assert document["paths"].keys() == BODIES.keys()
    for path, body_class in BODIES.items():
        body = document["paths"][path]["post"]["requestBody"]
        reference = body["content"]["application/json"]["schema"]["$ref"]
        assert body["required"] is True
        assert reference == f"#/components/schemas/{body_class.__name__}"
    references = re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document))
    assert set(references) <= schemas.keys()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    library = Library(folder / "adapters")
    add_adapter(library, folder / "made", "tickets", 1)
    with running(library) as found:
        yield found


def test_the_bodies_of_its_curl_calls_are_answered(server):
    calls = re.findall(
        r"curl http://[^/]+(/\S+) .*?-d '(.*?)'\n", PAGE.read_text(), flags=re.DOTALL
    )
    assert len(calls) >= 2
    for path, body in calls:
        found = server.post(path, json.loads(body.replace("smollm2-135m", BASE)))
        assert found.status_code == 200, (path, found.text)


def test_its_python_runs(server, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    code = code.replace("http://127.0.0.1:8000", server.url).replace("smollm2-135m", BASE)
    run = compile(code, "docs/serve.md", "exec")
    exec(run, {})
    assert capsys.readouterr().out.strip()
