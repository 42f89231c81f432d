"""Containers without Docker: a process under a real /opt/ml, first of its own process tree, where the kernel lets us.

In a user namespace the mount of /opt/ml and the process ids are the container's alone; outside nothing changes. Where
user namespaces are barred, the same command runs as a plain process on the same tree, under its own path.
"""

import functools
import os
import re
import shutil
import signal
import subprocess
import sysconfig
import venv
from pathlib import Path

MOUNT = """
set -e
stage=$1/stage; mkdir -p $stage; mount -t tmpfs tmpfs $stage
for entry in /opt/*; do
  name=$(basename "$entry"); [ "$name" = ml ] && continue
  if [ -d "$entry" ]; then mkdir "$stage/$name"; mount --rbind "$entry" "$stage/$name"; fi
done
mkdir $stage/ml; mount --bind "$1/ml" $stage/ml
mount --rbind $stage /opt
shift; exec "$@"
"""
UNSHARE = ["unshare", "--map-root-user", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]


@functools.lru_cache
def namespaces():
    """True when this kernel lets us mount and number processes in a user namespace."""
    if shutil.which("unshare") is None or not Path("/opt").is_dir():
        return False
    probe = [*UNSHARE, "bash", "-c", "mount -t tmpfs tmpfs /opt"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def make_image(folder):
    """An environment with everything that a training image has, and without Gorgon and torchao; its `bin` directory.

    The packages are links to the test environment's. pip may add to it but, kept offline, cannot replace any of them.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(Path(folder).glob("lib/python*/site-packages"))
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if (
            not re.search("gorgon|torchao", entry.name.lower())
            and entry.name != "__pycache__"
            and not (site / entry.name).exists()
        ):
            (site / entry.name).symlink_to(entry)
    return Path(folder) / "bin"


class Container:
    """A running container: `root/ml` is its /opt/ml."""

    def __init__(self, command, root, image_bin, environment, output):
        root = Path(root)
        kept = {k: os.environ[k] for k in ("HOME", "LANG", "OMP_NUM_THREADS") if k in os.environ}
        scratch = root / "tmp"  # a container leaves its temporary files to nobody
        scratch.mkdir(parents=True, exist_ok=True)
        self.environment = {
            **kept, "TMPDIR": str(scratch), "PATH": f"{image_bin}:/usr/local/bin:/usr/bin:/bin", "PIP_NO_INDEX": "1",
            "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "160", **environment,
        }  # fmt: skip
        self.inside = namespaces()
        if self.inside:
            command = [*UNSHARE, "bash", "-c", MOUNT, "mount", str(root), *command]
        else:
            base = str(root / "ml")
            command = [part.replace("/opt/ml", base) for part in command]
            self.environment = {k: v.replace("/opt/ml", base) for k, v in self.environment.items()}
            self.environment |= {"GORGON_CODE": f"{base}/input/data/code", "GORGON_FAILURE": f"{base}/output/failure"}
            self.environment["HF_HOME"] = f"{base}/cache"
        self.process = subprocess.Popen(
            command, env=self.environment, stdout=output, stderr=subprocess.STDOUT, text=True, cwd=root,
            start_new_session=True,
        )  # fmt: skip

    def terminate(self):
        """SIGTERM to the container's first process, as the service sends it."""
        pid = self.process.pid
        if self.inside:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            if not children:
                return
            pid = int(children[0])
        os.kill(pid, signal.SIGTERM)

    def kill(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait(self, timeout=None):
        return self.process.wait(timeout)
