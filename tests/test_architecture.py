"""The house stands as drawn: imports go one way, nobody uses another module's private names, and `import fastdiff` is
light."""

import ast
import functools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("numba", "diffusers", "denoising_diffusion_pytorch", "torchdiffeq", "sklearn", "PIL", "tqdm", "safetensors")
# Seconds that `import fastdiff` may take once torch is imported.
IMPORT_SECONDS = 0.4


def modules(folder: str) -> dict[str, Path]:
    """The modules of a folder by their dotted names."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


PACKAGE, KERNELS, BENCHMARKS = modules("fastdiff"), modules("kernels"), modules("benchmarks")
SHIPPED = PACKAGE | {f"fastdiff.{name}": path for name, path in KERNELS.items()}


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports(name: str, path: Path) -> list[tuple[str, str | None, ast.AST]]:
    """(module, imported name or None, node) of every import in a file, those inside functions too."""
    package, found = name if path.name == "__init__.py" else name.rpartition(".")[0], []
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, None, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *(node.module or "").split(".")]).strip(".")
            found += [(base, alias.name, node) for alias in node.names]
    return found


def uses(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules among `known` that a file imports. `from package import name` is the module of that name, if it is
    one."""
    found = set()
    for base, imported, _ in imports(name, path):
        whole = f"{base}.{imported}"
        found |= {m for m in ((whole if whole in known else base),) if m in known and m != name}
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for following in graph[todo.pop()] - seen:
                seen.add(following)
                todo.append(following)
        return seen

    reached = {name: reach(name) for name in graph}
    groups = {frozenset({a, *(b for b in reached[a] if a in reached[b])}) for a in graph if a in reached[a]}
    return sorted(sorted(group) for group in groups)


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.slow
def test_imports_go_one_way() -> None:
    known = {name: path for name, path in SHIPPED.items() if name != "fastdiff"}
    assert circles({name: uses(name, path, known) for name, path in known.items()}) == []


def private_uses(name: str, path: Path, known: dict[str, Path]) -> list[str]:
    """Places where a file takes a private name out of another module, by import or as its attribute."""
    found, local = [], {}
    for base, imported, node in imports(name, path):
        ours = base.split(".")[0] in ("fastdiff", "benchmarks")
        if ours and imported and imported.startswith("_") and not imported.startswith("__"):
            found.append(f"{name}:{node.lineno} imports {base}.{imported}")
        if imported and f"{base}.{imported}" in known:
            local[imported] = f"{base}.{imported}"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in local:
            private = node.attr.startswith("_") and not node.attr.startswith("__")
            if private and local[node.value.id] != name:
                found.append(f"{name}:{node.lineno} uses {local[node.value.id]}.{node.attr}")
    return found


@pytest.mark.slow
def test_private_names_stay_at_home() -> None:
    known = SHIPPED | BENCHMARKS
    assert [use for name, path in known.items() for use in private_uses(name, path, known)] == []


@pytest.mark.slow
def test_imports_of_the_layers() -> None:
    for name, path in KERNELS.items():
        used = {base for base, _, _ in imports(f"fastdiff.{name}", path) if base.startswith("fastdiff")}
        assert all(base.startswith("fastdiff.kernels") for base in used), f"{name} imports {used}"
    for name, path in PACKAGE.items():
        kernels = {base for base, _, _ in imports(name, path) if base.startswith("fastdiff.kernels")}
        assert not kernels or name.startswith(("fastdiff.ops", "fastdiff.kernels")), f"{name} imports {kernels}"
    assert "triton" not in {base for base, _, _ in imports("fastdiff.reference", PACKAGE["fastdiff.reference"])}
    for name, path in SHIPPED.items():
        outside = {base for base, _, _ in imports(name, path) if base.split(".")[0] in ("tests", "benchmarks")}
        assert not outside, f"{name} imports {outside}"
    helpers = {path.stem for path in (ROOT / "tests").rglob("*.py")}
    for name, path in BENCHMARKS.items():
        assert not helpers & {base.split(".")[0] for base, _, _ in imports(name, path)}, name


def test_kernels_are_of_the_language_of_the_oldest_triton() -> None:
    """Triton 3.3 refuses a chain of three conditions, and takes a comparison of the number of bits for true."""
    asked = [n for path in KERNELS.values() if "import triton" in path.read_text() for n in ast.walk(tree(path))]
    within = [n for f in asked if isinstance(f, ast.FunctionDef) and f.decorator_list for n in ast.walk(f)]
    chains = [ast.unparse(n) for n in within if isinstance(n, ast.BoolOp) and len(n.values) > 2]
    bits = [ast.unparse(n) for n in within if isinstance(n, ast.Compare) and "bitwidth" in ast.unparse(n.left)]
    assert not chains and all("//" in comparison for comparison in bits)


@pytest.fixture(scope="module")
def imported() -> list[tuple[float, list[str]]]:
    """The seconds that `import fastdiff` takes and the modules it brings, in each child of a process that has imported
    torch. Without fork it is the process."""
    code = """
import json, os, sys, time, torch
before = set(sys.modules)
for _ in range(3):
    if not getattr(os, "fork", int)():
        start = time.process_time()
        import fastdiff
        print(json.dumps([time.process_time() - start, sorted(set(sys.modules) - before)]), flush=True)
        os._exit(0)
    os.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_imports_of_fastdiff_bring_no_triton_and_no_extra(imported) -> None:
    for _, loaded in imported:
        assert "fastdiff" in loaded and not {module.split(".")[0] for module in loaded} & {"triton", *EXTRAS}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_imports_of_fastdiff_are_quick(imported) -> None:
    assert statistics.median(seconds for seconds, _ in imported) < IMPORT_SECONDS


@pytest.mark.parametrize("name", sorted(SHIPPED | BENCHMARKS))
def test_architecture_of_files(name: str) -> None:
    """A file fits a reader's head: 400 lines, but for the one that numba's cache watches."""
    lines = len((SHIPPED | BENCHMARKS)[name].read_text(encoding="utf-8").splitlines())
    assert lines <= 400 or name == "fastdiff.kernels.cpu_compiled"
