"""The worked example of CONTRIBUTING.md is a method: one file, and everything finds it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

CHECK = """
import sys
import secateurs as sc
from secateurs.methods import weights
weights.__path__.append(sys.argv[1])
assert "least-moved" in sc.list_methods()
sys.path.insert(0, sys.argv[2])
from bare_loop import main
outcome = main("least-moved", "sparsity=0.9", steps=60)
assert abs(outcome.masks.sparsity - 0.9) <= 1 / outcome.masks.total
from click.testing import CliRunner
from secateurs.cli import main as cli
shown = CliRunner().invoke(cli, ["prune", "--method", "least-moved", "--help"]).output
assert "--updates" in shown, shown
"""


def example() -> str:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(found) == 1
    return found[0]


def test_the_worked_example_is_short() -> None:
    assert len(example().splitlines()) < 100


def test_the_worked_example_runs_as_one_file(tmp_path: Path) -> None:
    (tmp_path / "least_moved.py").write_text(example())
    done = subprocess.run(
        [sys.executable, "-c", CHECK, str(tmp_path), str(ROOT / "examples")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
