#!/bin/bash
# Starts a job in the container: installs the wheel from the code channel, then becomes the command it was given, so that
# SIGTERM reaches that command (bash as the first process would swallow it).
code=${GORGON_CODE:-/opt/ml/input/data/code}
failure=${GORGON_FAILURE:-/opt/ml/output/failure}
log=$(mktemp)
trap 'echo "stopped before the step began"; exit 0' TERM
python3 -c 'import importlib.metadata as m
for name in ("torch", "torchvision", "torchaudio"):
    try: print(f"{name}=={m.version(name)}")
    except m.PackageNotFoundError: pass' > "$log.torch"   # the image's torch fits its CUDA: pip must not replace it
# Where the image's Python is its system's (PEP 668), this container is still nobody else's.
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-cache-dir --disable-pip-version-check --quiet --find-links "$code" \
  --constraint "$log.torch" ${GORGON_PIP_OPTIONS:-} "$(echo "$code"/gorgon_llm-*.whl)${GORGON_EXTRAS:-}" > "$log" 2>&1 &
wait $! || {
  mkdir -p "$(dirname "$failure")"
  { echo "InstallError: pip could not install Gorgon in this image"; tail -c 900 "$log"; } > "$failure"
  cat "$log" >&2
  exit 1
}
trap - TERM
export HF_HOME=${HF_HOME:-/opt/ml/cache/huggingface} PYTHONUNBUFFERED=1
exec "$@"
