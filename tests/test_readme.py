"""What the README says of the files is true, and what may be imported where."""

import ast
import re

from conftest import ROOT

README = (ROOT / "README.md").read_text()
FILES = ("vit.py", "llm.py", "projector.py", "losses.py", "data.py", "train.py", "eval.py")


def test_line_counts():
    """Within a tenth: a count that drifts further is a promise that nobody keeps."""
    for name in FILES:
        promised = int(re.search(rf"\| \[{name}\].*\| (\d+) \|", README)[1])
        lines = len((ROOT / name).read_text().splitlines())
        assert abs(lines - promised) <= 0.1 * promised, f"{name} has {lines} lines, the README says {promised}"


def imports(name):
    tree = ast.parse((ROOT / name).read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def test_rooms():
    """Data flows one way, image -> vit -> projector -> llm -> loss; the top floor alone sees everything."""
    ours = {name.removesuffix(".py") for name in FILES}
    may = {"vit.py": set(), "llm.py": {"vit"}, "projector.py": {"vit", "llm"}, "losses.py": set(), "data.py": {"vit"},
           "eval.py": {"data", "losses", "projector", "vit"}}
    for name, allowed in may.items():
        assert imports(name) & ours <= allowed, name


def test_no_other_code_at_the_top():
    assert {path.name for path in ROOT.glob("*.py")} == set(FILES)
