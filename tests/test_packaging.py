"""What an installation holds: as a wheel the package alone, in editable mode a plain path.

The tests of both need an installation of that kind, which `.ci/run` makes.
"""

import json
import re
from importlib.metadata import distributions
from pathlib import Path

import pytest

import fused_smoothl1
from tests.support import ROOT

PACKAGE = Path(fused_smoothl1.__file__).parent
# (An egg-info, which setuptools left in older checkouts, has no RECORD.)
INSTALLED = [d for d in distributions(name=PACKAGE.name) if d.read_text("RECORD")]
EDITABLE = {"dir_info": {"editable": True}, "url": ROOT.as_uri()}
EDITABLES = [d for d in INSTALLED if json.loads(d.read_text("direct_url.json") or "{}") == EDITABLE]
WHEELS = [d for d in INSTALLED if Path(str(d.locate_file(PACKAGE.name))) == PACKAGE]


@pytest.mark.skipif(not EDITABLES, reason="waits for an installation in editable mode")
def test_editable_installation_is_a_plain_path() -> None:
    """A type checker reads a path, but does not run an import hook."""
    (path,) = [path for path in EDITABLES[0].files or () if path.suffix == ".pth"]
    assert path.read_text().splitlines() == [str(ROOT)]


@pytest.mark.skipif(not WHEELS, reason="waits for an installed wheel")
def test_wheel_is_the_package_alone() -> None:
    files = WHEELS[0].files or []
    information = f"{PACKAGE.name}-{fused_smoothl1.__version__}.dist-info"
    assert {path.parts[0] for path in files} == {PACKAGE.name, information}
    assert f"{PACKAGE.name}/py.typed" in map(str, files)


def test_newest_release_of_the_changelog_is_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    dated = re.findall(r"^## \[(.+)\] - \d{4}-\d{2}-\d{2}$", text, re.MULTILINE)
    assert dated[:1] == [fused_smoothl1.__version__]
