"""Container images, pinned by exact tag, each with the reason; and what may not be used, with the reason.

The tags were read in AWS's public sources (sagemaker SDK 3.27's image tables, the deep-learning-containers repository),
not pulled. A floating tag can change what a running project is, so none is accepted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from gorgon.errors import CloudError

DLC_ACCOUNT = "763104351884"
CUDA_13_AMI = "al2023-ami-sagemaker-inference-gpu-4-1"
"""Driver 580: what a container with CUDA 13.0 needs. The default image of the host has an older driver."""


@dataclass(frozen=True)
class Image:
    """A pinned image.

    Args:
        repository, tag: below AWS's registry of the region.
        reason: why this one.
        ami: version of the host's image that an endpoint with it needs.
        extras: extras of our package to install in it.
    """

    repository: str
    tag: str
    reason: str
    ami: str | None = None
    extras: str = ""

    def uri(self, region: str) -> str:
        """The image's address in a region."""
        domain = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
        return f"{DLC_ACCOUNT}.dkr.ecr.{region}.{domain}/{self.repository}:{self.tag}"


TRAINING = {
    "training-gpu": Image(
        "huggingface-pytorch-training", "2.9.0-transformers5.3.0-gpu-py312-cu130-ubuntu22.04-v1.0",
        "the newest Hugging Face training image that the SDK's table lists: Python 3.12, torch 2.9, CUDA 13.0; "
        "transformers is raised to ours when the job starts",
        extras="gpu",
    ),
    "training-cpu": Image(
        "pytorch-training", "2.9.0-cpu-py312-ubuntu22.04-sagemaker",
        "the same torch without CUDA, for steps on ml.m, ml.c and ml.r machines",
    ),
}  # fmt: skip

SERVING = {
    "djl": Image(
        "djl-inference", "0.38.0-lmi29.0.0-cu130",
        "runs our own engine through its Python async handler, so that no image need be built; CUDA 13.0",
        ami=CUDA_13_AMI,
    ),
    "vllm": Image(
        "vllm", "0.30.0-gpu-py312-cu130-ubuntu24.04-sagemaker",
        "vLLM 0.24 to 0.32 serve Medusa and keep a JSON value's quotes; 0.30.0 is the newest that AWS's tables pin",
        ami=CUDA_13_AMI,
    ),
    "tgi": Image(
        "huggingface-pytorch-tgi-inference", "2.7.0-tgi3.3.6-gpu-py311-cu124-ubuntu22.04",
        "the last TGI image: the project is in maintenance mode; it is what the AWS sample's successor would use",
        ami="al2-ami-sagemaker-inference-gpu-3-1",
    ),
}  # fmt: skip

ENGINE_IMAGES = {"gorgon": "djl", "vllm": "vllm", "tgi": "tgi"}
FLOATING = re.compile(r"^(latest|.*-cuda-v\d+)$")
VLLM_FIRST, VLLM_LAST = (0, 24), (0, 32)
TGI_LAST = (3, 3, 6)


def training_image(given: str | None, instance_type: str, region: str) -> tuple[str, str]:
    """URI of a job's image and the extras to install in it.

    Args: given: a key of the table, a URI, or None for the table's choice by machine.
    Raises: CloudError for a floating tag or a name that is neither a key nor a URI.
    """
    if given is None:
        given = "training-gpu" if has_gpu(instance_type) else "training-cpu"
    if given in TRAINING:
        image = TRAINING[given]
        return image.uri(region), image.extras
    refuse_floating(given, list(TRAINING))
    return given, ""


def serving_image(engine: str, given: str | None, region: str) -> tuple[str, str | None]:
    """URI of an endpoint's image, and the version of the host's image that it needs.

    Raises: CloudError for a floating tag, and for a vLLM or TGI that does not serve Medusa heads.
    """
    if given is None:
        given = ENGINE_IMAGES[engine]
    if given in SERVING:
        return SERVING[given].uri(region), SERVING[given].ami
    refuse_floating(given, list(SERVING))
    if engine == "vllm":
        _check_vllm(given)
    if engine == "tgi":
        _check_tgi(given)
    return given, CUDA_13_AMI if "cu13" in given else None


def refuse_floating(uri: str, keys: list[str]) -> None:
    """Raises CloudError unless `uri` names an exact image: a digest, or a tag that does not move."""
    if "/" not in uri:
        raise CloudError(
            "not a container image", field="image", value=uri, allowed=f"a URI, or one of: {', '.join(keys)}"
        )
    if "@sha256:" in uri:
        return
    tag = uri.rpartition("/")[2].partition(":")[2]
    if not tag or FLOATING.match(tag):
        raise CloudError(
            "a floating image tag: what it names can change under a running project", field="image", value=uri,
            allowed="an exact version, or NAME@sha256:DIGEST",
            hint="vLLM dropped Medusa in 0.33, so the day the tag moves the endpoint loses its heads",
        )  # fmt: skip


def _check_vllm(uri: str) -> None:
    tag = uri.rpartition(":")[2]
    found = re.match(r"v?(\d+)\.(\d+)\.\d+", tag)
    version = (int(found[1]), int(found[2])) if found else None
    if version is None:
        raise CloudError(
            "the tag does not say which vLLM this is, and not every one serves Medusa", field="image", value=uri,
            allowed="a tag that begins with a version from 0.24.0 to 0.32",
        )  # fmt: skip
    if not VLLM_FIRST <= version <= VLLM_LAST:
        reason = (
            "vLLM 0.33 removed Medusa" if version > VLLM_LAST
            else "before vLLM 0.24 the container's start script loses the quotes of a JSON setting"
        )  # fmt: skip
        raise CloudError(
            f"this image does not serve Medusa heads: {reason}", field="image", value=uri,
            allowed="vLLM 0.24 to 0.32", hint="`--engine gorgon` serves the heads with any version of anything",
        )  # fmt: skip


def _check_tgi(uri: str) -> None:
    found = re.search(r"tgi(\d+)\.(\d+)\.(\d+)", uri)
    if found is None or tuple(int(n) for n in found.groups()) > TGI_LAST:
        raise CloudError(
            "not a TGI image that is known to serve Medusa heads", field="image", value=uri,
            allowed="an image with tgi3.3.6 or older in its tag",
        )  # fmt: skip


def has_gpu(instance_type: str) -> bool:
    """True for machines with NVIDIA GPUs: families g and p."""
    return bool(re.match(r"ml\.(g\d|p\d)", instance_type))


GPUS = {
    "ml.g4dn.12xlarge": 4, "ml.g5.12xlarge": 4, "ml.g5.24xlarge": 4, "ml.g5.48xlarge": 8, "ml.g6.12xlarge": 4,
    "ml.g6.24xlarge": 4, "ml.g6.48xlarge": 8, "ml.g6e.12xlarge": 4, "ml.g6e.24xlarge": 4, "ml.g6e.48xlarge": 8,
    "ml.p3.8xlarge": 4, "ml.p3.16xlarge": 8, "ml.p3dn.24xlarge": 8, "ml.p4d.24xlarge": 8, "ml.p4de.24xlarge": 8,
    "ml.p5.48xlarge": 8, "ml.p5e.48xlarge": 8, "ml.p5en.48xlarge": 8, "ml.p6-b200.48xlarge": 8,
    "ml.p6-b300.48xlarge": 8, "ml.g7e.12xlarge": 2, "ml.g7e.24xlarge": 4, "ml.g7e.48xlarge": 8,
}  # fmt: skip
"""Machines with more than one GPU."""


def gpu_count(instance_type: str) -> int:
    """GPUs of a machine; those that are not listed have one, or none."""
    return GPUS.get(instance_type, int(has_gpu(instance_type)))
