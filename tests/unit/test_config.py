"""Configurations: every problem at once, nearest names, no coercion."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from gorgon.config import STEPS, TrainHeadsConfig, build, nearest, parse_assignments, parse_value, read_yaml
from gorgon.errors import ConfigError


@pytest.mark.parametrize(("step", "kind"), STEPS.items())
def test_every_setting_has_a_default_and_a_description(step, kind):
    config = build(kind, {}, step=step)
    assert build(kind, config.model_dump(), step=step) == config
    for name, field in kind.model_fields.items():
        assert field.description and field.description.endswith("."), name


def test_an_unknown_key_names_the_nearest_one():
    with pytest.raises(ConfigError, match=r"unknown key 'train-heads\.epoch': did you mean 'epochs'\?"):
        build(TrainHeadsConfig, {"epoch": 3}, step="train-heads")


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        build(TrainHeadsConfig, {"epoch": 3, "heads": 0, "seed": "x"}, step="train-heads")
    assert len(error.value.problems) == 3


def test_numbers_given_as_text_are_not_guessed():
    with pytest.raises(ConfigError, match="heads"):
        build(TrainHeadsConfig, {"heads": "5"}, step="train-heads")


def test_a_configuration_cannot_be_changed():
    config = TrainHeadsConfig()
    with pytest.raises(ValidationError):
        config.heads = 3


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("3", 3), ("true", True), ("null", None), ("[1, 2]", [1, 2]), ("a b", "a b"), ("x1", "x1"),
     ("{question: q}", {"question": "q"}), ("", None)],
)  # fmt: skip
def test_values_of_the_command_line(text, value):
    assert parse_value(text) == value


@given(st.text(max_size=30))
def test_any_assignment_is_parsed_or_refused(text):
    try:
        assert isinstance(parse_assignments([text]), dict)
    except ConfigError as error:
        assert error.exit_code == 2


def test_assignments_without_equals_are_refused_together():
    with pytest.raises(ConfigError) as error:
        parse_assignments(["a.b", "=3", "c.d=4"])
    assert len(error.value.problems) == 2


@pytest.mark.parametrize("content", [b"a: [1", b"- 1\n- 2", b"\xff\xfe\x00", b"just text"])
def test_files_that_are_no_mapping(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        read_yaml(path)


def test_a_missing_file_and_a_directory(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot read"):
        read_yaml(tmp_path)


def test_no_near_name_lists_them_all():
    assert nearest("zzz", ["alpha", "beta"]) == "known: alpha, beta"
