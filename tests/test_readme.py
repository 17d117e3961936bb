"""The README's examples, run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
# Those for other libraries' models have stand-ins: test_fuse_examples.py.
OWN = re.sub(r"## The models that you have\n.*?\n(?=## )", "", README, flags=re.DOTALL)
EXAMPLES = re.findall(r"```python\n(.*?)```", OWN, flags=re.DOTALL)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 2


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    variables: dict[str, object] = {}
    exec(compile(EXAMPLES[number], f"README example {number}", "exec"), variables)
    if "pyramid" in variables:
        assert list(variables["pyramid"]) == ["0", "1", "2", "3", "pool"]  # type: ignore[call-overload]
    if "explain" in EXAMPLES[number]:
        assert "lateral_connection: served by" in capsys.readouterr().out


def test_the_commands_it_names_exist() -> None:
    makefile = (Path(__file__).resolve().parents[1] / "Makefile").read_text()
    for command in set(re.findall(r"`?make (\w+)", README)):
        assert re.search(rf"^{command}:", makefile, flags=re.MULTILINE), command
