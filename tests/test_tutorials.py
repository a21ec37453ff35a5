"""The commands of docs/tutorials.md: each is one that the command line takes, and no preset is forgotten."""

import re
from pathlib import Path

import pytest

from vaeops import models
from vaeops.train import config

TEXT = (Path(__file__).parent.parent / "docs" / "tutorials.md").read_text()
COMMANDS = sorted(set(re.findall(r"`vaeops train ([^`]+)`", TEXT)))


@pytest.mark.parametrize("command", COMMANDS)
def test_settings(command):
    preset, *settings = re.sub(r"--root \S+", "", command).split()
    found = config.parse([f"preset={preset}", *settings])
    models.create(found.preset, **found.model)


def test_every_preset_is_there():
    assert set(models.presets()) <= {word for code in re.findall(r"`([^`]+)`", TEXT) for word in code.split()}
