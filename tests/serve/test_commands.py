"""What docs/serve.md says of other programs, asked of these programs: the llm command, curl."""

import json
import os
import re
import shutil
import subprocess

import pytest

from tests.serve.server import BASE, add_adapter, running
from tests.serve.tables import PAGE
from veneer.library.library import Library
from veneer.serve.http.keys import ApiKey, ApiKeys, hashed

LLM, CURL = (shutil.which(name) for name in ("llm", "curl"))
PORT = "http://127.0.0.1:8000"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    library = Library(folder / "adapters")
    add_adapter(library, folder / "made", "tickets", 1)
    return library


@pytest.fixture(scope="module")
def server(library):
    with running(library) as found:
        yield found


def output_of(words, **environment):
    kept = {"PATH": os.environ["PATH"], "HOME": environment.get("HOME", "/")}
    found = subprocess.run(
        words, capture_output=True, text=True, timeout=120, env={**kept, **environment}
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def expected(server, **more):
    body = {
        "model": "tickets",
        "messages": [{"role": "user", "content": "Where is my parcel?"}],
        "temperature": 0,
    }
    return server.post("/v1/chat/completions", {**body, "max_tokens": 12, **more}).json()[
        "choices"
    ][0]["message"]


@pytest.mark.skipif(LLM is None, reason="the llm command is not on the path: pip install llm")
@pytest.mark.parametrize("key", ["", "k" * 40], ids=["without a key", "with a key"])
def test_the_llm_command_asks_as_the_page_says(library, tmp_path, key):
    (yaml,) = re.findall(r"```\n(- model_id: .*?)```", PAGE.read_text(), flags=re.DOTALL)
    with running(
        library, keys=ApiKeys([ApiKey("use", hashed(key), "one")]) if key else None
    ) as server:
        place = {"LLM_USER_PATH": str(tmp_path), "HOME": str(tmp_path)}
        if key:
            assert (
                "`api_key_name: veneer`" in PAGE.read_text()
                and "`llm keys set veneer`" in PAGE.read_text()
            )
            yaml += "  api_key_name: veneer\n"
            output_of([LLM, "keys", "set", "veneer", "--value", key], **place)
        (tmp_path / "extra-openai-models.yaml").write_text(yaml.replace(PORT, server.url))
        options = ["-o", "temperature", "0", "-o", "max_tokens", "12"]
        ask = [LLM, "-m", "tickets", "Where is my parcel?", *options]
        with running(library) as open_server:
            text = expected(open_server)["content"]
        assert output_of([*ask, "--no-stream"], **place).strip() == text.strip()
        assert output_of(ask, **place).strip() == text.strip()


@pytest.mark.skipif(CURL is None, reason="curl is not on the path")
def test_curl_asks_as_the_page_says(server):
    call_text = r"^(curl \S+ -H '[^']*' -d '.*?'\n)"
    calls = re.findall(call_text, PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(calls) == 2
    for call in calls:
        address, header, body = re.match(
            r"curl (\S+) -H '(.*?)' -d '(.*)'\n", call, re.DOTALL
        ).groups()
        words = [
            CURL,
            "-sS",
            address.replace(PORT, server.url),
            "-H",
            header,
            "-d",
            body.replace("smollm2-135m", BASE),
        ]
        found = json.loads(output_of(words))
        assert found["object"] in ("chat.completion", "text_completion"), found
