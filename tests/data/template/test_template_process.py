"""Templates of strangers: what would hang, fill the memory or the disk is stopped in seconds, and
the rest goes on."""

import resource
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import pytest

from tests.support.tiny import tiny_tokenizer
from veneer.data.examples import Problem, Row, RowRef
from veneer.data.template import rendering
from veneer.data.template import worker as template_worker
from veneer.data.template.rendering import (
    Conversation,
    Template,
    TemplateWorker,
    beginnings,
    render_all,
)
from veneer.data.template.sandbox import TemplateFault, compile_template
from veneer.data.template.template import ChatTemplate
from veneer.errors import DataError

if not sys.platform.startswith("linux"):
    pytest.skip("the limits are those of Linux", allow_module_level=True)

MESSAGES = [
    {"role": "user", "content": 'ask é \U0001f469 \n"quoted"'},
    {"role": "assistant", "content": "answer"},
]
PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt "
    "%}[assistant]{% endif %}"
)

ENDLESS = {
    "nested loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(9) %}{% endfor "
        "%}{% endfor %}{% endfor %}"
    ),
    "one power of a variable": "{% set n = messages | length * 0 + 9 %}{{ (n ** (n ** n)) % 7 }}",
    "when it is compiled": "{{ 9 ** (9 ** 9) }}",
}
TOO_LARGE = {
    "a long text": "{% set x = 'a' * (10 ** 9 * (messages | length)) %}{{ x }}{{ x }}",
    "doubled text": (
        "{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor "
        "%}{{ n.x }}"
    ),
    "a wide field": "{{ '%2000000000d' % (messages | length) }}",
    "a wide line": "{{ messages[0].content | center(2000000000) }}",
    "a deep indent": "{{ messages | tojson(indent=2000000000) }}",
    "a long list": "{{ [1] * (10 ** 10) }}",
    "more than the output may hold": "{{ 'a' * (20000000 * (messages | length)) }}",
    "more than a short row can need": "{{ 'a' * 100000 }}",
}
REFUSED = {
    "a long range": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "attributes by filter": "{{ messages | attr('__class__') | attr('__mro__') }}",
    "attributes by dots": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attributes by format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "globals of a helper": "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "an import": "{% import 'os' as os %}{{ os }}",
    "an include": "{% include '/etc/passwd' %}",
    "changing what it is given": "{{ messages.append(1) }}",
    "no template": "{% for %}",
}


def rendered(source, messages=MESSAGES):
    return Conversation(Template(source, {}, date(2026, 1, 31)), messages, None).text(
        len(messages), add_generation_prompt=True
    )


@pytest.fixture
def one_worker(monkeypatch):
    """A process of its own: what it refuses is forgotten afterwards."""
    worker = TemplateWorker()
    monkeypatch.setattr(rendering, "_worker", lambda: worker)
    yield worker
    worker.close()


@pytest.mark.parametrize("what", [w for w in ENDLESS if w != "nested loops"])
def test_what_does_not_end_is_stopped_once_and_never_tried_again(what, one_worker):
    with pytest.raises(TemplateFault, match="stopped"):
        rendered(ENDLESS[what])
    begun = one_worker._process
    with pytest.raises(TemplateFault, match="stopped"):
        rendered(ENDLESS[what])
    assert one_worker._process is begun, "no process was begun for it, or ended by it"
    assert rendered(PLAIN).endswith("[assistant]answer[assistant]")  # another template is served


def test_a_template_that_one_conversation_stopped_is_tried_again_for_those_who_ask_for_it(
    one_worker,
):
    source = (
        "{% for m in messages if m.content == 'slow' %}{{ 9 ** (9 ** (9 + messages | length)) }}{%"
        " endfor %}done"
    )
    with pytest.raises(TemplateFault, match="stopped"):
        rendered(source, [{"role": "user", "content": "slow"}])
    with pytest.raises(TemplateFault, match="stopped"):
        rendered(source)
    rendering.retry_refused()
    assert rendered(source) == "done"


def test_the_process_is_stopped_after_two_seconds_of_its_own_time(one_worker):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(TemplateFault, match="2 s"):
        rendered(ENDLESS["nested loops"])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert 1.5 < used < 4.0


@pytest.mark.parametrize("what", TOO_LARGE)
def test_what_is_too_large_is_refused(what, one_worker):
    with pytest.raises(
        TemplateFault, match=r"stopped|memory|more than|MemoryError|too large|OverflowError"
    ):
        rendered(TOO_LARGE[what])
    assert rendered(PLAIN).endswith("[assistant]")


@pytest.mark.parametrize("what", REFUSED)
def test_what_reaches_out_is_refused_and_the_process_lives_on(what, one_worker):
    rendered(PLAIN)
    process = one_worker._process
    try:
        text = rendered(REFUSED[what])
    except TemplateFault:
        text = ""
    for secret in ("root:", "uid=", "<class", "<function", "__builtins__"):
        assert secret not in text
    assert rendered(PLAIN)
    assert one_worker._process is process


def test_a_conversation_renders_as_it_does_in_this_process():
    messages = [
        *MESSAGES,
        {"role": "user", "content": "\udbff\udc41 x \udbff"},
        {"role": "assistant", "content": ""},
    ]
    render = compile_template(PLAIN, {"bos_token": "<s>"}, date(2026, 1, 31))
    conversation = Conversation(
        Template(PLAIN, {"bos_token": "<s>"}, date(2026, 1, 31)), messages, None
    )
    cuts = beginnings(messages)
    render_all([(conversation, cuts)])
    assert set(conversation.rendered) == set(cuts) == {(4, False), (1, True), (2, False), (3, True)}
    for count, prompt in [*cuts, (4, True)]:
        assert conversation.text(count, add_generation_prompt=prompt) == render(
            messages[:count], None, prompt, {}
        )


def test_what_comes_back_is_bounded_by_what_was_asked_and_held_once(one_worker, monkeypatch):
    """A thousand rows are held at once: each beginning of a long conversation would be a copy of
    it."""
    turn = [
        {"role": "user", "content": "ask " * 5000},
        {"role": "assistant", "content": "say " * 5000},
    ]
    messages = turn * 10
    lines = []
    own = one_worker._line
    monkeypatch.setattr(
        one_worker, "_line", lambda process: lines.append(own(process)) or lines[-1]
    )
    conversation = Conversation(Template(PLAIN, {}, date.today()), messages, None)
    render_all([(conversation, beginnings(messages))])
    asked = sum(len(m["content"]) for m in messages)
    assert [len(line) < 1.1 * asked for line in lines] == [True]
    held = {
        id(text): len(text)
        for known in conversation.rendered.values()
        for text in (known.first, known.rest)
    }
    assert sum(held.values()) < 1.1 * asked
    for count, prompt in conversation.rendered:
        expected = "".join(f"[{m['role']}]{m['content']}" for m in messages[:count])
        assert (
            conversation.text(count, add_generation_prompt=prompt)
            == expected + "[assistant]" * prompt
        )


def test_texts_that_differ_from_the_first_character_on_count_together(one_worker):
    """A conversation of 40 messages has 40 beginnings."""
    source = "{{ messages | length }}" + "{{ 'a' * 30000 }}"
    messages = MESSAGES * 20
    conversation = Conversation(Template(source, {}, date.today()), messages, None)
    render_all([(conversation, beginnings(messages))])
    kept = [
        known for known in conversation.rendered.values() if not isinstance(known, TemplateFault)
    ]
    assert 1 < len(kept) < 10
    refused = [
        str(known) for known in conversation.rendered.values() if isinstance(known, TemplateFault)
    ]
    assert refused and all("characters of this conversation" in fault for fault in refused)


def test_many_conversations_are_under_way_at_once_and_a_hostile_one_costs_only_its_own(one_worker):
    good, bad = (
        Template(PLAIN, {}, date.today()),
        Template(ENDLESS["one power of a variable"], {}, date.today()),
    )
    long = [{"role": "user", "content": "word " * 20_000}]
    wanted = [
        (Conversation(bad if n in (3, 5) else good, long, None), [(1, True), (1, False)])
        for n in range(9)
    ]
    render_all(wanted)
    for number, (conversation, _) in enumerate(wanted):
        if number in (3, 5):
            with pytest.raises(TemplateFault, match="stopped"):
                conversation.text(1, add_generation_prompt=True)
        else:
            assert (
                conversation.text(1, add_generation_prompt=False) == f"[user]{long[0]['content']}"
            )


def test_rows_of_a_hostile_template_are_problems_not_a_hang(one_worker):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = PLAIN + ENDLESS["nested loops"]
    template = ChatTemplate(tokenizer)
    rows = [Row(RowRef("f", n), MESSAGES) for n in range(40)]
    found = template.encode_rows(rows, train_on="assistant")
    assert all(isinstance(result, Problem) and "stopped" in result.message for result in found)
    with pytest.raises(DataError, match="stopped"):
        template.render(MESSAGES)


def test_the_process_is_started_again_if_it_was_killed(one_worker):
    assert rendered(PLAIN)
    one_worker._process.kill()
    one_worker._process.wait()
    assert rendered(PLAIN)


def test_it_gets_no_secrets_and_cannot_write_files(one_worker, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    rendered(PLAIN)
    pid = one_worker._process.pid
    environment = Path(f"/proc/{pid}/environ").read_bytes()
    assert b"secret-token" not in environment and b"PATH" in environment
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert "Max file size             0" in limits
    assert str(template_worker.MEMORY_BYTES) in limits


def test_it_ends_when_the_process_that_started_it_ends(tmp_path):
    code = (
        "from datetime import date\n"
        "from veneer.data.template import rendering\n"
        "c = rendering.Conversation(rendering.Template('x', {}, date.today()), [], None)\n"
        "assert c.text(0, add_generation_prompt=False) == 'x'\n"
        "print(rendering._worker()._process.pid, flush=True)\n"
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    there = Path(f"/proc/{pid}/cmdline")
    for _ in range(100):
        if not there.exists() or not there.read_bytes():  # gone, or ended and not yet collected
            return
        time.sleep(0.05)
    pytest.fail("the process outlives the one that started it")


def test_messages_that_are_no_json_are_refused():
    with pytest.raises(TemplateFault, match="JSON"):
        rendered(PLAIN, [{"role": "user", "content": {1, 2}}])


def test_who_is_interrupted_leaves_no_answer_to_the_next_one(one_worker, monkeypatch):
    assert rendered(PLAIN).startswith("[user]ask")
    line, interrupted = one_worker._line, []

    def interrupting(process):
        if not interrupted:
            interrupted.append(process)
            raise KeyboardInterrupt
        return line(process)

    monkeypatch.setattr(one_worker, "_line", interrupting)
    with pytest.raises(KeyboardInterrupt):
        rendered(PLAIN, [{"role": "user", "content": "what was interrupted"}])
    assert (
        rendered(PLAIN, [{"role": "user", "content": "what comes next"}])
        == "[user]what comes next[assistant]"
    )
    assert rendered(PLAIN, [{"role": "user", "content": "and then"}]) == "[user]and then[assistant]"
