"""The Dockerfile, which cannot be built in tests: what it copies, installs and starts is what there is to start."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

from gorgon.cloud.images import refuse_floating
from gorgon.serve import settings

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions(word):
    """Arguments of every instruction of a kind; a line that ends with a backslash goes on."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    return [line.split(None, 1)[1].strip() for line in text.splitlines() if line.startswith(f"{word} ")]


def test_every_instruction_is_one_of_docker():
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    words = {line.split()[0] for line in text.splitlines() if line.strip() and not line.startswith("#")}
    assert words == {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "LABEL", "EXPOSE", "ENTRYPOINT"}
    assert "USER" not in words and "CMD" not in words, "SageMaker runs the container as root, with a word of its own"


def test_the_base_is_pinned_and_has_our_python():
    base, *others = instructions("ARG")
    assert [other.partition("=")[0] for other in others] == ["TORCH", "EXTRAS"]
    name, _, image = base.partition("=")
    refuse_floating(image, [])
    assert instructions("FROM") == [f"${{{name}}}"] and "-runtime" in image


def test_what_is_copied_is_there_and_enough_to_install():
    sources = [source for line in instructions("COPY") for source in line.split()[:-1]]
    assert all((ROOT / source).exists() for source in sources), sources
    assert {"pyproject.toml", "constraints.txt", "src", PROJECT["readme"], *PROJECT["license-files"]} <= set(sources)


def test_pip_gets_every_extra_that_the_container_needs_and_no_torch(tmp_path):
    torch, install = [line for line in instructions("RUN") if "pip install" in line]
    assert torch.startswith('test -z "$TORCH" ||'), "the usual base image has its own"
    assert install.endswith('".[$EXTRAS]"')
    extras = next(line for line in instructions("ARG") if line.startswith("EXTRAS=")).partition("=")[2].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])
    assert "serve" in extras, "without it `gorgon serve` finds no HTTP server"
    (tmp_path / "constraints.txt").write_text((ROOT / "constraints.txt").read_text())
    made = re.search(r"grep .* > rest\.txt", install)[0]
    subprocess.run(["sh", "-ec", made], cwd=tmp_path, check=True)
    pins = [line for line in (tmp_path / "rest.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert len(pins) > 40 and not [pin for pin in pins if re.match(r"torch\b(?!-)", pin)]
    assert "--constraint torch.txt --constraint rest.txt" in install and "> torch.txt" in install


def test_the_entry_point_is_the_command_and_serves_where_sagemaker_looks(monkeypatch, tmp_path):
    (entry,) = instructions("ENTRYPOINT")
    assert json.loads(entry) == ["gorgon"] and "gorgon" in PROJECT["scripts"]
    assert f"mkdir -p {settings.MODEL_DIRECTORY}" in instructions("RUN")
    monkeypatch.setattr(settings, "MODEL_DIRECTORY", tmp_path)
    monkeypatch.delenv("SAGEMAKER_BIND_TO_PORT", raising=False)
    assert instructions("EXPOSE") == [str(settings.container_defaults()["port"])]
    assert settings.container_defaults()["host"] == "0.0.0.0", "reached from outside"
    assert instructions("LABEL") == ["com.amazonaws.sagemaker.capabilities.accept-bind-to-port=true"]
