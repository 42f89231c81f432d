# An image of your own, for training jobs and endpoints alike: needed under network isolation, and where pip may not
# reach PyPI when a job starts. Not needed otherwise: the pinned AWS images of gorgon/cloud/images.py do.
#
#   docker build -t ACCOUNT.dkr.ecr.REGION.amazonaws.com/gorgon:0.1.0 .
#   docker push ACCOUNT.dkr.ecr.REGION.amazonaws.com/gorgon:0.1.0
#
# then `sagemaker.image` and `sagemaker.endpoint.image` in the recipe. Never push it as `latest`: that is refused.
#
# For machines without a GPU, a far smaller one (put pip's option for an index of CPU builds behind the version; a plain
# torch from PyPI brings CUDA):
#
#   docker build --build-arg BASE=python:3.12-slim --build-arg TORCH='torch==2.13.0' --build-arg EXTRAS=serve -t ... .
ARG BASE=pytorch/pytorch:2.9.0-cuda12.8-cudnn9-runtime
FROM ${BASE}
# Words for pip about torch, for a base image that has none.
ARG TORCH=
ARG EXTRAS=gpu,serve

# Some base images keep their system's Python for the system (PEP 668); this container has no other use for it.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PYTHONUNBUFFERED=1 HF_HOME=/opt/ml/cache/huggingface
WORKDIR /opt/gorgon
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
# The base image's torch fits its CUDA: the constraint keeps pip from replacing it.
RUN test -z "$TORCH" || python3 -m pip install --no-cache-dir $TORCH
RUN python3 -c 'import torch; print("torch==" + torch.__version__)' > torch.txt \
 && grep -v '^torch==' constraints.txt > rest.txt \
 && python3 -m pip install --no-cache-dir --constraint torch.txt --constraint rest.txt ".[$EXTRAS]"

# SageMaker starts an endpoint's container with the one word `serve`, which here is the command: the model is in
# /opt/ml/model or where GORGON_MODEL says, the port 8080 or SAGEMAKER_BIND_TO_PORT. A training job's request names its
# own command. `docker run -p 8080:8080 -v MODEL:/opt/ml/model IMAGE serve` does the same anywhere.
LABEL com.amazonaws.sagemaker.capabilities.accept-bind-to-port=true
EXPOSE 8080
RUN mkdir -p /opt/ml/model
ENTRYPOINT ["gorgon"]
