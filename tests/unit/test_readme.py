"""The README shows the committed results and nothing else, and its links and commands lead somewhere."""

import importlib.util
import re
from pathlib import Path

from gorgon.config import STEPS

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()


def test_the_table_is_made_from_the_committed_results():
    spec = importlib.util.spec_from_file_location("record", ROOT / "benchmarks" / "record.py")
    record = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(record)
    assert record.render() == TEXT, "run: python benchmarks/record.py"
    assert list(record.RESULTS.glob("*.json")), "there are no committed results"


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target


def test_named_recipes_and_steps_exist():
    for recipe in re.findall(r"recipes/[\w.-]+\.yaml", TEXT):
        assert (ROOT / recipe).is_file(), recipe
    assert all(f"`{step}`" in TEXT for step in STEPS)
