"""One name, one version, one floor of torch; a short README; pages that point to what is there."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest

import fastdiff
from fastdiff.training.arguments import TRAIN_HELP

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[2]
SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = ("fastdiff", "kernels", "benchmarks", "tests", "docs", "examples", ".github", ".ci")
SUFFIXES = {".py", ".md", ".yml", ".yaml", ".toml", ".ipynb", ".cff", ".cfg", ".txt", ""}


def text_files() -> list[Path]:
    """Every text file of the checkout that is ours."""
    files = [path for path in ROOT.iterdir() if path.is_file()]
    files += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    return [
        path for path in files if path.suffix in SUFFIXES and "__pycache__" not in path.parts and path.name != ".git"
    ]


def prose(text: str) -> str:
    """A Markdown page without its programs."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def test_the_map_names_every_file_of_the_package():
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = page[page.index("## The map") : page.index("## Add something")]
    files = {path.name for path in (ROOT / "fastdiff").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert not [name for name in files if f"/{name}`" not in named and f"`{name}`" not in named]


def test_no_hint_installs_the_other_fastdiff():
    # In regular expressions of tests the bracket is escaped.
    old = re.compile(r"pip install '?\"?fastdiff(?!-kernels)\b|(?<![-\w.])fastdiff\\*\[[a-z-]+\\*\]")
    assert old.search("pip install fastdiff") and old.search("'fastdiff[cpu]'") and old.search(r"fastdiff\[ode\]")
    assert not old.search("pip install 'fastdiff-kernels[cpu]'")
    found = []
    for path in text_files():
        if path != Path(__file__):
            lines = path.read_text(encoding="utf-8").splitlines()
            found += [
                f"{path.relative_to(ROOT)}:{i}: {line.strip()}" for i, line in enumerate(lines, 1) if old.search(line)
            ]
    assert not found, "\n".join(found)


def test_hints_name_extras_that_there_are():
    extras = set(re.findall(r'^        "([a-z-]+)": \[', SETUP, re.M))
    assert {"cpu", "train", "ode", "diffusers", "docs"} <= extras
    for path in text_files():
        if path != Path(__file__):
            for named in re.findall(r"fastdiff-kernels\[([a-z,-]+)\]", path.read_text(encoding="utf-8")):
                assert named == "extra" or set(named.split(",")) <= extras, f"{path.relative_to(ROOT)}: {named}"


def test_one_version():
    shown = subprocess.run(
        [sys.executable, "setup.py", "--name", "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert shown[-2:] == ["fastdiff-kernels", fastdiff.__version__]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == fastdiff.__version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert newest[1] == fastdiff.__version__
    numbers = [
        path for path in (ROOT / "fastdiff").rglob("*.py") if "__version__ =" in path.read_text(encoding="utf-8")
    ]
    assert numbers == [ROOT / "fastdiff" / "__init__.py"]


def test_one_floor_of_torch_and_of_python():
    floor = re.search(r'"torch>=([\d.]+)"', SETUP)[1]
    for page in ("README.md", "docs/index.md"):
        assert re.findall(r"torch >= ([\d.]+)", (ROOT / page).read_text(encoding="utf-8")) == [floor], page
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text(encoding="utf-8"))
    matrix = workflow["jobs"]["suite"]["strategy"]["matrix"]
    oldest = {row["torch"]: row for row in matrix["include"]}["oldest"]
    assert oldest["packages"] == f"torch=={floor}.*"
    assert oldest["triton"] == f"triton=={re.search(r'triton>=([0-9.]+)', SETUP)[1]}.*"
    assert f'python_requires=">={matrix["python"][0]}"' in SETUP


@pytest.mark.parametrize(
    "path", [*sorted((ROOT / ".github").rglob("*.yml")), ROOT / ".pre-commit-config.yaml"], ids=lambda path: path.name
)
def test_configurations_are_yaml(path):
    assert yaml.safe_load(path.read_text(encoding="utf-8"))


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 120
    paragraphs = [p for p in prose(README).split("\n\n") if not p.lstrip().startswith(("|", "<", "[!", "#"))]
    assert all(len(p.split()) <= 60 for p in paragraphs)
    measured = README.partition("## Measured")[2].partition("## Develop")[0]
    rows = [line for line in measured.splitlines() if line.startswith("|") and not line.startswith("|---")]
    assert 2 <= len(rows) <= 7  # a title and at most six rows


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_the_root_pages_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if not link.startswith(("http", "../../actions")):
            assert (ROOT / link).exists(), link


@pytest.mark.slow
def test_the_performance_page_is_what_the_results_say():
    run = forked.run("docs/performance.py", "--check", cwd=ROOT)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_the_page_of_scale_has_the_tables_of_its_program():
    run = forked.run("docs/scale.py", "--check", cwd=ROOT)
    assert run.returncode == 0, run.stderr


def test_the_pages_of_training_name_every_flag():
    pages = "".join(
        (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("training.md", "data.md", "evaluate.md")
    )
    assert [name for name in TRAIN_HELP if f"`--{name.replace('_', '-')}" not in pages] == []


def test_files_that_pages_name_are_there():
    """Paths in backticks that name a folder of the checkout."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    named = re.compile(
        r"`(?:python |pytest )?((?:fastdiff|kernels|benchmarks|tests|docs|examples|\.ci)/[\w./-]+)[^`]*`"
    )
    missing = []
    for page in pages:
        for path in named.findall(page.read_text(encoding="utf-8")):
            if path.isupper() or "NAME" in path or "DEVICE" in path:
                continue
            if not (ROOT / path).exists():
                missing.append(f"{page.relative_to(ROOT)}: {path}")
    assert not missing, "\n".join(missing)


def test_the_api_pages_show_sections_and_examples_of_a_docstring(monkeypatch):
    """mkdocstrings drops a section whose text stands on its line, and takes lines with >>> for quotations."""
    monkeypatch.setitem(sys.modules, "griffe", SimpleNamespace(Extension=object, Object=object))
    sections = runpy.run_path(str(ROOT / "docs" / "sections.py"))
    text = "Half.\n\nReturns: x / 2,\n    as x.\nReference: none.\n\nMore.\n>>> a = half(2)\n>>> b = a"
    made = "Half.\n\n\n**Returns:** x / 2, as x.\n\n**Reference:** none.\n\nMore.\n\n```python\na = half(2)\nb = a\n```"
    assert sections["rewritten"](text) == made
    assert "extensions: [docs/sections.py]" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
