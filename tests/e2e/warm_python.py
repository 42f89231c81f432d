"""A Python that starts at once: forks of one process that has imported what training needs, which takes seconds.

torchrun starts its workers with the interpreter that PYTHON_EXEC names. `warm_python` gives it a script that hands its
arguments, environment and streams to a fork of the warm process, passes signals on, and ends as the fork ends. The fork
is a process like any other; only its imports are not its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

STUB = """#!{python} -ISs
import array, json, os, signal, socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect({address!r})
asked = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
socket.send_fds(link, [len(asked).to_bytes(8, "big")], [0, 1, 2])
link.sendall(asked)
answers = link.makefile()
fork = int(answers.readline())
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: os.kill(fork, number))
code = int(answers.readline())
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@contextlib.contextmanager
def warm_python(folder, modules):
    """The environment that makes torchrun use it. `modules`: what the warm process imports."""
    address, stub = str(folder / "warm"), folder / "python"
    command = [sys.executable, __file__, address, *modules]
    process = subprocess.Popen(command, env={**os.environ, "NO_COLOR": "1", "COLUMNS": "200"})
    try:
        while not Path(address).exists():
            assert process.poll() is None, "the warm process has ended"
            time.sleep(0.01)
        stub.write_text(STUB.format(python=sys.executable, address=address))
        stub.chmod(0o755)
        yield {"PYTHON_EXEC": str(stub)}
    finally:
        process.kill()
        process.wait()


def serve(address, modules):
    """Imports, then forks whenever a stub asks."""
    for name in modules:
        __import__(name)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address + ".new")
    listener.listen()
    Path(address + ".new").rename(address)
    while True:
        link, _ = listener.accept()
        size, streams, _, _ = socket.recv_fds(link, 8, 3)
        data = link.makefile("rb").read(int.from_bytes(size, "big"))
        fork = os.fork()
        if fork == 0:
            listener.close()
            _be(*json.loads(data), streams, link)
        for stream in streams:
            os.close(stream)
        threading.Thread(target=_watch, args=(link, fork), daemon=True).start()


def _watch(link, fork):
    """Tells the stub how its fork ended; ends the fork when the stub was killed."""
    link.sendall(b"%d\n" % fork)
    ended = threading.Event()

    def follow():
        if link.recv(1) == b"" and not ended.is_set():
            os.kill(fork, signal.SIGKILL)

    threading.Thread(target=follow, daemon=True).start()
    _, status = os.waitpid(fork, 0)
    ended.set()
    with contextlib.suppress(OSError):
        link.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def _be(arguments, environment, folder, streams, link):
    """Becomes the process that the stub was started as: `-u -m MODULE ...` or `-u SCRIPT ...`."""
    link.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    code = 0
    try:
        _customize(environment.get("PYTHONPATH", ""))
        assert arguments[:2] == ["-u", "-m"], arguments
        sys.argv = ["", *arguments[3:]]
        runpy.run_module(arguments[2], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - shown as Python itself does
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _customize(path):
    """Runs the environment's sitecustomize, as a fresh interpreter does."""
    for folder in path.split(os.pathsep):
        if (Path(folder) / "sitecustomize.py").is_file():
            runpy.run_path(str(Path(folder) / "sitecustomize.py"))
            return


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
