"""Recipes: every one is parsed and dry-run; wiring of inputs; bad recipes."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gorgon.cli import app
from gorgon.errors import ConfigError
from gorgon.pipeline import RECIPES, find_recipe, load_recipe

NAMES = sorted(p.stem for p in RECIPES.glob("*.yaml"))


def test_the_promised_recipes_are_there():
    assert {"quickstart", "text-to-sql-cpu", "zephyr-7b-sql"} <= set(NAMES) and len(NAMES) >= 4


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_parsed_and_dry_run(name):
    result = CliRunner().invoke(app, ["run", name, "--dry-run"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["name"] == name and document["description"]
    order = list(document["steps"])
    assert (order[0], order[-1]) == ("prepare", "compare")
    first = (RECIPES / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# gorgon "), "a recipe opens with the command that runs it"


def test_the_reference_recipe_has_the_reference_systems_settings():
    steps = load_recipe(find_recipe("zephyr-7b-sql"), [], Path("o")).steps
    prepare, finetune, heads = (steps[s] for s in ("prepare", "finetune", "train-heads"))
    assert (prepare.rows, prepare.validation_fraction, prepare.test_fraction, prepare.seed) == (3000, 0.15, 0.15, 42)
    assert (finetune.lora_rank, finetune.lora_alpha, finetune.quantization) == (16, 16, "nf4")
    assert finetune.batch_size * finetune.gradient_accumulation == 16
    assert (finetune.learning_rate, finetune.max_grad_norm) == (1e-4, 10.0)
    assert (heads.heads, heads.layers, heads.epochs) == (5, 1, 3.0)


def test_steps_read_what_the_steps_before_them_wrote():
    steps = load_recipe(find_recipe("quickstart"), [], Path("o")).steps
    assert steps["finetune"].model == "embedded" and steps["finetune"].data == "o/prepare"
    assert steps["distill"].model == steps["train-heads"].model == "o/finetune"
    assert steps["train-heads"].data == "o/distill"
    assert steps["tune"].model == "o/train-heads" and steps["compare"].model == "o/tune"


def test_a_step_can_be_left_out():
    steps = load_recipe(
        find_recipe("quickstart"), ["finetune=null", "distill=null", "model=some/hub-id"], Path("o")
    ).steps
    assert list(steps) == ["prepare", "train-heads", "tune", "compare"]
    assert steps["train-heads"].model == "some/hub-id" and steps["train-heads"].data == "o/prepare"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("name: x\n", "no steps"),
        ("tune: 3\n", "must be a mapping"),
        ("prepar: {}\n", "did you mean 'prepare'"),
        ("tune: {promts: 3}\n", "did you mean 'prompts'"),
        ("tune: {prompts: many}\n", "tune.prompts"),
    ],
)
def test_bad_recipes(tmp_path, text, word):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=word):
        load_recipe(path, [], Path("o"))
