"""What is installed: the package alone, without measuring code. And benchmarks/ needs nothing of the tests."""

import ast
from pathlib import Path

import pytest
import setuptools  # noqa: F401  (brings distutils, which Python 3.12 has no more)

ROOT = Path(__file__).resolve().parents[2]
# What measuring does to compilers and drivers.
PATCHES = ("mock.patch", "monkeypatch", "JITFunction.run =", "driver.set_active", "GraphLowering")


@pytest.fixture
def modules(monkeypatch) -> dict[str, Path]:
    """The modules of the wheel by name, as setup.py gives them to setuptools."""
    from distutils.core import run_setup

    monkeypatch.chdir(ROOT)
    setup = run_setup("setup.py", stop_after="init")
    folders = {package: setup.package_dir.get(package, package.replace(".", "/")) for package in setup.packages}
    found = {f"{p}.{path.stem}": path for p, folder in folders.items() for path in sorted((ROOT / folder).glob("*.py"))}
    return found | {module: ROOT / f"{module}.py" for module in setup.py_modules or ()}


def imported(path: Path) -> set[str]:
    """The names of the modules that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_the_wheel_holds_the_package_alone(modules):
    assert {"fastdiff.diffusion", "fastdiff.ops.dispatch", "fastdiff.kernels.noise"} <= set(modules)
    folders = {path.relative_to(ROOT).parent.parts[:1] for path in modules.values()}
    assert folders <= {(), ("fastdiff",), ("kernels",)}


@pytest.mark.slow
def test_the_wheel_holds_no_mock_and_no_patch_of_a_compiler(modules):
    forbidden = {"unittest", "mock", "pytest", "hypothesis", "benchmarks", "tests"}
    for name, path in modules.items():
        assert not {module.split(".")[0] for module in imported(path)} & forbidden, name
        text = path.read_text(encoding="utf-8")
        assert not [patch for patch in PATCHES if patch in text], name


def test_these_patches_are_those_of_measuring():
    """So that the test above would find them."""
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks" / "static").glob("*.py"))
    assert {patch for patch in PATCHES if patch in text} == set(PATCHES) - {"monkeypatch"}


def test_benchmarks_import_nothing_of_the_tests():
    forbidden = {"tests", "conftest", *(path.stem for path in (ROOT / "tests" / "helpers").glob("*.py"))}
    for path in (ROOT / "benchmarks").rglob("*.py"):
        assert not {module.split(".")[0] for module in imported(path)} & forbidden, path
