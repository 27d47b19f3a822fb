"""Runs of train_gpt.py in processes that have PyTorch imported before they begin.

Five of a tiny run's six seconds go to imports. The standard library's fork server imports once for
a worker of the tests; a run is then a fork of it that takes the folder, environment and console of
a command and executes the file as `__main__`. Everything else is as by the command line, which the
tests of a fresh process (`fresh=True`, torchrun, errors) use.
"""

import io
import math
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.reduction import DupFd

IMPORTS = ["torch", "torch._dynamo", "torch.distributed", "numpy", "sentencepiece"]
IMPORTS += ["constriction", "safetensors.torch", "zstandard", "multiprocessing.connection"]


def execute(path: str, cwd: str, env: dict[str, str], out, err) -> None:
    """Become `python path` in a folder with an environment and two pipes."""
    for descriptor, target in ((out.detach(), 1), (err.detach(), 2)):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    encoding = env.get("PYTHONIOENCODING", "utf-8")
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb"), encoding, line_buffering=False)
    sys.stderr = io.TextIOWrapper(
        os.fdopen(2, "wb"), encoding, errors="backslashreplace", line_buffering=True
    )
    sys.argv = [path]
    sys.orig_argv = [sys.executable, path]
    sys.path[0] = os.path.dirname(path)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores it
    runpy.run_path(path, run_name="__main__")


class ForkedRun:
    """A started run, with what tests use of subprocess.Popen."""

    def __init__(self, path: str, cwd: str, env: dict[str, str]):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTS)
        ends = [os.pipe(), os.pipe()]
        pipes = [DupFd(write) for _, write in ends]
        self.args = [sys.executable, path]
        self.process = context.Process(target=execute, args=(path, str(cwd), dict(env), *pipes))
        self.process.start()
        for _, write in ends:
            os.close(write)
        self.stdout, self.stderr = (os.fdopen(read, encoding="utf-8") for read, _ in ends)
        self.pid = self.process.pid
        self.readers, self.texts = [], {}

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """(rest of stdout, of stderr) once the run has ended; TimeoutExpired if it does not."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        if not self.readers:
            for file in (self.stdout, self.stderr):
                reader = threading.Thread(
                    target=lambda f: self.texts.update({f: f.read()}), args=[file]
                )
                reader.daemon = True
                reader.start()
                self.readers.append(reader)
        for reader in self.readers:
            reader.join(min(end - time.monotonic(), threading.TIMEOUT_MAX))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(max(1.0, min(end - time.monotonic(), 1e6)))
        return self.texts[self.stdout], self.texts[self.stderr]
