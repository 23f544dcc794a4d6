"""What README and docs name is there: links, files, functions, the tree of the package; and the picture is its script's."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

PAGES = [Path("README.md"), Path("LOG.md"), *sorted(Path("docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def resolve(name: str) -> list[Path]:
    """The files that a page may mean by a name: from the top, or from fastdraft/."""
    return [path for path in (Path(name), Path("fastdraft", name)) if path.exists()]


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "LOG.md"], ids=str)
def test_files_and_functions_named_are_there(page):
    """A path in backquotes is a file's; a name in backquotes right after it is defined in that file."""
    for name, following in re.findall(r"`([\w/]+\.(?:py|jsonl|cu))`(?:[ \n]+`(\w+)`)?", page.read_text()):
        if "/" not in name and not resolve(name):
            continue  # a file of the user's, or of another project
        files = resolve(name)
        assert files, f"{page} names {name}"
        if following:
            assert any(re.search(rf"(def|class) {following}\b", f.read_text()) for f in files), f"{name} has no {following}"


def test_the_readme_lists_what_is_in_the_package():
    tree = Path("README.md").read_text().split("```\nfastdraft/\n")[1].split("```")[0]
    listed = set(re.findall(r"[\w/]+(?:\.py|/)(?=\s)", tree))
    files = {path.name for path in Path("fastdraft").glob("*.py")} - {"__init__.py"}
    folders = {f"{path.parent.relative_to('fastdraft')}/" for path in Path("fastdraft").glob("*/**/__init__.py")}
    assert listed == files | folders


def test_the_picture_is_its_scripts():
    """If this fails: python docs/img/ttt_step.py, and commit what it writes."""
    assert Path("docs/img/ttt-step.svg").read_text() == runpy.run_path("docs/img/ttt_step.py")["picture"]()


def test_no_file_holds_the_marks_of_a_merge():
    """Neither a linter nor a reader of Python sees them in a page or in rows of results."""
    kinds = {".md", ".py", ".cu", ".jsonl", ".yaml", ".toml", ".svg", ".slurm", ".sh"}
    folders = map(Path, ("fastdraft", "tests", "docs", "bench", "examples", "csrc"))
    files = [*Path().glob("*.md"), *(p for folder in folders for p in folder.rglob("*") if p.suffix in kinds)]
    marks = tuple((7 * c).encode() + b" " for c in "<>|")
    marked = [str(p) for p in files if any(line.startswith(marks) for line in p.read_bytes().splitlines())]
    assert len(files) > 200 and not marked
