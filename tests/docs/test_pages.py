"""The pages say what is true: their programs run, their printed output and figures are what the code gives."""

import contextlib
import io
import json
import os
import re
import runpy
from pathlib import Path

import pytest
import torch

from fastdiff import objective, schedule, steps

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
# A fence ```python is a program, and ```text after it is what it prints. ```py is only shown.
PROGRAM = re.compile(r"^```python\n(.*?)^```\n(?:\n^```text\n(.*?)^```\n)?", re.M | re.S)
FEW = 3  # training steps, in place of the hundreds of a page
FEWER = 12  # images, in place of 64


def programs(path: Path) -> list[tuple[str, str | None]]:
    """The programs of a page in their order, and the output that follows each, if there is one."""
    return [(found[1], found[2]) for found in PROGRAM.finditer(path.read_text(encoding="utf-8"))]


def shorter(code: str) -> str:
    """The program with FEW training steps, which draws FEWER images."""
    code = re.sub(r"range\(300\)|(?<=STEPS = )300", lambda found: found[0].replace("300", str(FEW)), code)
    return re.sub(r"(?<=\.sample\()64\b", str(FEWER), code)


@pytest.fixture(autouse=True)
def one_thread(tmp_path, monkeypatch):
    """Small tensors on one thread, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# The programs of quickstart.md run as the cells of the notebook.
@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if programs(page) and page.stem != "quickstart"], ids=lambda page: page.name
)
def test_programs_of_a_page_run_and_print_what_it_says(page):
    if page.stem == "diffusers":
        pytest.importorskip("diffusers")
    namespace = {"__name__": "__main__"}
    for code, output in programs(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(shorter(code), str(page), "exec"), namespace)
        if output is not None:
            assert printed.getvalue() == output


@pytest.mark.slow
def test_the_program_of_the_readme_runs(tmp_path):
    ((code, _),) = programs(ROOT / "README.md")
    assert "range(300)" in code
    exec(compile(shorter(code), "README.md", "exec"), {"__name__": "__main__"})
    assert (tmp_path / "digits.png").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sampler", "objective", "operation", "scheduler"])
def test_examples_of_extending_run(name):
    if name == "scheduler":
        pytest.importorskip("diffusers")
    path = ROOT / "examples" / "extending" / f"{name}.py"
    known = set(objective.OBJECTIVES)
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        for added in set(objective.OBJECTIVES) - known:
            del objective.OBJECTIVES[added]


def test_extending_shows_every_example():
    shown = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    for path in (ROOT / "examples" / "extending").glob("*.py"):
        assert f'--8<-- "examples/extending/{path.name}"' in shown


def test_the_notebook_has_the_cells_of_quickstart():
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [code.rstrip("\n") for code, _ in programs(ROOT / "docs" / "quickstart.md")] == cells
    assert all(not cell.get("outputs") for cell in notebook["cells"])


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = shorter(cell.source)
    runner = client.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    runner.execute(env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert (tmp_path / "digits.png").exists()


def test_the_arithmetic_of_the_worked_step_gives_the_row():
    text = (ROOT / "docs" / "ideas.md").read_text(encoding="utf-8")
    row = dict(re.findall(r"^(x0_from_\w+|from_\w+) +(-?[\d.]+)$", text, re.M))
    sums = re.findall(r"^\| `(\w+)` \| .* \| ([-\d. /x]+) \|$", text, re.M)
    assert len(sums) == 4
    for name, formula in sums:
        # Six digits are shown of every number; the quotients lose two of them.
        assert eval(formula.replace("x", "*")) == pytest.approx(float(row[name]), abs=2e-5), name


def test_every_sampler_is_on_the_pages():
    choosing = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    reference = (ROOT / "docs" / "api" / "samplers.md").read_text(encoding="utf-8")
    for name, sampler in steps.SAMPLERS.items():
        assert f'`"{name}"`' in choosing, name
        assert sampler.__name__ in reference, sampler


def test_every_scheduler_is_on_the_pages():
    pytest.importorskip("diffusers")
    from fastdiff.interop.diffusers import SCHEDULERS

    page, reference, readme = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("docs/diffusers.md", "docs/api/interop.md", "README.md")
    )
    for scheduler in SCHEDULERS:
        assert f"\n| `{scheduler.__name__}` |" in page and f"- {scheduler.__name__}\n" in reference, scheduler
    assert f"{len(SCHEDULERS)} schedulers of diffusers" in readme


def test_every_objective_and_schedule_is_on_the_pages():
    choosing = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    for name in (*objective.OBJECTIVES, *schedule.SCHEDULES):
        assert f'`"{name}"`' in choosing, name


def test_no_member_of_an_api_page_names_a_file_too():
    """fastdiff.ops.loss is a function when it runs, and a file to what makes the page, which would leave it out."""
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    listed = re.findall(r"^::: (\S+)\n +options:[^\[]*members: ?\[([^\]]+)\]", pages, flags=re.M)
    assert len(listed) > 15
    for module, members in listed:
        folder = ROOT / module.replace(".", "/")
        assert not [name for name in re.findall(r"\w+", members) if (folder / f"{name}.py").exists()], module
