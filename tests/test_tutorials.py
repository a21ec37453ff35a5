"""docs/tutorials.md: no row is missing, and each has a command or a snippet that can be run."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from vaeops import cli, models
from vaeops.train import config, evaluate, workshop_celeba, workshop_vq

HERE = Path(__file__).parent
TEXT = (HERE.parent / "docs" / "tutorials.md").read_text()
ROWS = [line.strip("| ").split(" | ") for line in TEXT.splitlines() if line.startswith("| ")]
SNIPPETS = dict(re.findall(r"(?ms)^(Snippet \d+|Judge)\b[^\n]*\n```python\n(.*?)```", TEXT))
COMMANDS = sorted(set(re.findall(r"`((?:vaeops|pytest) [^`]+)`", TEXT)))


class Parsed(Exception):
    """A command's words were understood; it is to do no more."""


def parsed(*args, **options):
    raise Parsed


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command, monkeypatch):
    program, name, *words = shlex.split(command)
    if program == "pytest":
        text = (HERE.parent / name).read_text()
        assert words[:1] in ([], ["-k"])
        assert not words or re.search(rf"^def test_\w*{words[1]}", text, re.MULTILINE)
    elif name == "train":
        preset, *settings = [word for word in words if word not in ("--root", "DIR")]
        found = config.parse([f"preset={preset}", *settings])
        models.create(found.preset, **found.model)
    elif name == "experiment":
        module = {"workshop-celeba": workshop_celeba, "workshop-vq": workshop_vq}[words[0]]
        monkeypatch.setattr(module, "read", parsed)
        with pytest.raises(Parsed):
            module.main(words[1:])
    elif name == "plot":
        cli._plot_parser().parse_args(words)
    else:
        monkeypatch.setattr(evaluate, "load_model", parsed)
        with pytest.raises(Parsed):
            {"eval": evaluate.main, "sample": evaluate.sample_main}[name](words)


def test_every_row_and_every_preset_is_there():
    assert [int(row[0]) for row in ROWS if row[0].isdigit()] == list(range(1, 35))
    assert set(models.presets()) <= {word for code in re.findall(r"`([^`]+)`", TEXT) for word in code.split()}


@pytest.mark.parametrize("row", [row for row in ROWS if row[0].isdigit()], ids=lambda row: row[0])
def test_a_row_has_a_command_or_a_snippet(row):
    named = re.findall(r"snippet (\d+)", row[3])
    assert named or re.search("`(vaeops|pytest) ", row[3])
    assert {f"Snippet {number}" for number in named} <= SNIPPETS.keys()


@pytest.mark.parametrize("name", SNIPPETS)
def test_snippet(name):
    """It parses, and what it takes from vaeops is there."""
    for node in ast.walk(ast.parse(SNIPPETS[name])):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("vaeops"):
            for alias in node.names:
                resolve(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Attribute) and (path := ast.unparse(node)).startswith("vaeops."):
            resolve(re.match(r"[\w.]+", path).group())


def resolve(path):
    module, _, rest = path.partition(".")
    found = importlib.import_module(module)
    for part in rest.split("."):
        module = f"{module}.{part}"
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(module)
