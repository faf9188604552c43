"""What several tests make: rows (random ids with a shared start, the answer's tokens trained),
adapters, failures."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from multiprocessing import reduction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.models.routed import Routed
from veneer.adapters.attach import attach
from veneer.adapters.config import LoRA
from veneer.cli import main
from veneer.data.batching import by_length
from veneer.data.examples import Example, RowRef
from veneer.merge.fold.in_memory import merged_weights
from veneer.models.step import part_nats, parts_of

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def files_limited_to(size):
    """Within the block this process and its children write no files above `size` bytes (Linux).
    Python writes no bytecode meanwhile: it would be cut off without an error."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def make_examples(count, *, vocab=272, prompt=5, longest=24, seed=0):
    """`count` examples of ragged length that begin with the same `prompt` tokens; the first is the
    longest."""
    generator = np.random.default_rng(seed)
    start = generator.integers(0, vocab, prompt)
    examples = []
    for number in range(count):
        own = longest - prompt if number == 0 else int(generator.integers(4, longest - prompt + 1))
        ids = np.concatenate([start, generator.integers(0, vocab, own)]).astype(np.int32)
        trained = np.zeros(len(ids), dtype=bool)
        trained[prompt + 2 : len(ids) - number % 2] = True
        trained[prompt + 3 :: 4] = False
        examples.append(Example(ids, trained, RowRef("rows.jsonl", number + 1), 1000 + 17 * number))
    return examples


def fill(parameters, *, seed=0, scale=0.3):
    """Random values for every trained tensor, so that nothing hides behind B = 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def run_where_it_may_only_be_read(folder, code):
    """Runs Python code in a space of its own, where even root may only read `folder`; skips where
    there is none."""
    mount = f'mount --bind "{folder}" "{folder}" && mount -o remount,bind,ro "{folder}" || exit 77'
    mount += f'; mkdir "{folder}/x" 2>/dev/null && exit 77; exec "$@"'
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    line = ["unshare", "-m", "sh", "-c", mount, "sh", sys.executable, "-c", f"import sys\n{code}"]
    try:
        done = subprocess.run(
            line, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
        )
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if done.returncode == 77 or done.stderr.startswith("unshare:"):
        pytest.skip(f"this user may not mount: {done.stderr[-200:]}")
    return done


class FailAt:
    """Lets k - 1 calls through, then fails at the k-th (failure None: kills the process), and
    counts them all.

    calls: (module or class, name of the function) of what is counted.
    """

    def __init__(self, monkeypatch, calls, k, failure):
        self.calls, self.k, self.failure = 0, k, failure
        for owner, name in calls:
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name)))

    def _wrapped(self, real):
        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == self.k:
                if self.failure is None:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise self.failure
            return real(*args, **kwargs)

        return call


def filled_lora(base, **settings):
    """A LoRA called "a" beside the base, not acting yet, its values random."""
    head = base.model.get_output_embeddings()
    made = attach(
        base.model, LoRA(rank=3, alpha=5, **settings), name="a", routing=base.routing, head=head
    )
    fill(made.parameters().values())
    return made


def merge_in_memory(model, applied):
    """merged_weights, installed."""
    merged = merged_weights(model, applied)
    merged.install()
    return merged


CLEAN = multiprocessing.get_context("forkserver")
"""Forks of a process that has imported everything and computed nothing: a fork of this one, whose
OpenMP threads have worked, would wait for threads that it does not have, or crash."""
CLEAN.set_forkserver_preload(["tests.support.helpers", "veneer.api", "veneer.cli.main"])


def start_veneer(arguments, *, stdout, stderr):
    """`veneer ...` in a process of its own, which costs no imports; stdout and stderr: descriptors.
    The process."""
    process = CLEAN.Process(
        target=_be_veneer,
        args=([str(argument) for argument in arguments], Descriptor(stdout), Descriptor(stderr)),
    )
    process.start()
    return process


class Descriptor:
    """A descriptor that a process is started with."""

    def __init__(self, number):
        self.number = number

    def __reduce__(self):
        return _detached, (reduction.DupFd(self.number),)


def _detached(sent):
    return sent.detach()


def _be_veneer(arguments, stdout, stderr):
    code = 99
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(
                number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            )
        os.dup2(stdout, 1)
        os.dup2(stderr, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        os.setpgid(0, 0)  # `wait_until_begun` sees it
        code = main.main(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:  # just before or after the command
        code = 130
    except BaseException:  # what the interpreter says of a stream that fails as it ends
        code = 120
    finally:
        os._exit(code)


def wait_until_begun(process):
    """Waits until a process of `start_veneer` runs the command. A SIGINT before ends it in Python's
    fork server, silently, with exit code 1."""
    with suppress(ProcessLookupError):  # it has ended
        while process.is_alive() and os.getpgid(process.pid) != process.pid:
            time.sleep(0.001)


def veneer(arguments, *, stdout, stderr):
    """The exit code of `veneer ...`; minus the number of the signal that ended it."""
    process = start_veneer(arguments, stdout=stdout, stderr=stderr)
    process.join()
    return process.exitcode


@contextmanager
def ended_before_step(number):
    """Within, a run ends as by Ctrl-C when so many steps are done; it is expected to."""
    from veneer.training.trainee import Trainee

    own = Trainee.begin_step

    def step(self):
        if self.progress.step == number:
            raise KeyboardInterrupt
        return own(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainee, "begin_step", step)
        yield


class Killed(Exception):
    pass


@contextmanager
def killed_after_saving(step):
    """Within, a run dies right after its checkpoint at this step; it is expected to."""
    from veneer.training.trainee import Trainee

    own = Trainee.save

    def save(self):
        own(self)
        if self.progress.step == step:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainee, "save", save)
        yield


class Limited(nn.Module):
    """A gated block of which some layers have a limit, as Step-3.7's."""

    def __init__(self, own, limit):
        super().__init__()
        self.gate_proj, self.up_proj = own.gate_proj, own.up_proj
        self.down_proj, self.act_fn = own.down_proj, own.act_fn
        self.limit = limit

    def forward(self, x):
        gate, up = self.act_fn(self.gate_proj(x)), self.up_proj(x)
        if self.limit:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return self.down_proj(gate * up)


def evaluation_loss(model, paths, routing, examples, *, batch):
    """(sum of nats, trained tokens) over all examples: token-weighted, so it does not depend on
    `batch`."""
    parts = list(parts_of(Routed(model, paths), examples, by_length(examples, batch)))
    tokens = sum(int(example.trained.sum()) for example in examples)
    return sum(map(sum, part_nats(Routed(model, paths, routing), examples, parts))), tokens
