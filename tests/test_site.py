"""The pages of docs/ as a site."""

import subprocess
import sys

import pytest
import yaml
from processes import ROOT

SITE = yaml.safe_load((ROOT / "mkdocs.yml").read_text())


def test_every_page_is_in_the_navigation_once():
    pages = [page for section in SITE["nav"] for names in section.values() for page in names]
    assert sorted(pages) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install 'dschat[docs]' brings mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "flags" / "index.html").is_file()
    assert "--kl_coef" in (tmp_path / "search" / "search_index.json").read_text()
