import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
READMES = sorted(p for p in ROOT.rglob("README.md") if not {".venv", ".git"} & set(p.parts))
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(path):
    """The anchors of a Markdown file's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {text.replace(" ", "-") for text in words}


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    links = LINK.findall(path.read_text())
    for link in (link for link in links if "://" not in link):
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


def test_every_room_has_a_readme():
    rooms = [ROOT / name for name in ("configs", "launch", "tests")]
    rooms += [path.parent for path in (ROOT / "dit_jax").glob("*/__init__.py")]
    assert [str(room) for room in rooms if not (room / "README.md").is_file()] == []


def test_the_first_readme_fits_on_a_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
