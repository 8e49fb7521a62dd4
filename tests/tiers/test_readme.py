"""The README of the tiers: its examples run, and it names every file."""

import re
from pathlib import Path

import pytest

README = Path("tiers/README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_prints_what_it_promises(
    example: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "tiers/README.md", "exec"), {"__name__": "__main__"})
    promised = re.findall(r"print\(.*\)  # (.*)", example)
    assert promised
    assert capsys.readouterr().out.splitlines() == promised


def test_names_every_file() -> None:
    table = README.split("## What is where")[1]
    own = Path("tiers/prefix_kv/README.md").read_text().split("## What is where")[1]
    named = set(re.findall(r"`([a-z_0-9/]+\.py)`", table))
    named |= {f"prefix_kv/{name}" for name in re.findall(r"`([a-z_0-9/]+\.py)`", own)}
    files = {str(file.relative_to("tiers")) for file in Path("tiers").rglob("*.py")}
    assert named == {file for file in files if not file.endswith("__init__.py")}
