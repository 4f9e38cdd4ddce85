"""The processes that hold the device, one at a time."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from fzoo.bench.engines import Job

from . import PLATFORMS, ROOT

#: Seconds after which a process that says nothing is taken for stuck.
STUCK = 150.0


class Child:
    """A phase in a process of its own, in a session of its own, which a deadline ends."""

    def __init__(self, phase: str, work: list[Any], small: bool, threads: int, **env: str):
        given = {key: value for key, value in os.environ.items() if key != "JAX_PLATFORMS"}
        given |= {"JAX_PLATFORMS": PLATFORMS} if PLATFORMS else {}
        given |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
        given |= {"TORCHINDUCTOR_FREEZING": "1"}
        command = [
            sys.executable,
            str(ROOT / "benchmarks" / "accelerator.py"),
            "--phase",
            phase,
            "--threads",
            str(threads),
            *(["--small"] if small else []),
        ]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=given | env,
            start_new_session=True,
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.errors: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._read_errors, daemon=True).start()
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([dataclasses.asdict(w) if isinstance(w, Job) else w for w in work]))
        self.process.stdin.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.strip():
                self.errors = [*self.errors[-20:], line.strip()]

    def answers(self, deadline: float) -> Iterator[dict[str, Any]]:
        """Yield what it says, until it ends, says nothing for long, or the time is up; then it is no more."""
        try:
            while (left := min(deadline - time.monotonic(), STUCK)) > 0:
                try:
                    line = self.lines.get(timeout=left)
                except queue.Empty:
                    return
                if line is None:
                    return
                if line.startswith("{"):
                    yield json.loads(line)
        finally:
            code = self.process.poll()
            if code is None:
                try:
                    self.process.wait(2)
                except subprocess.TimeoutExpired:
                    os.killpg(self.process.pid, signal.SIGKILL)
                    self.process.wait()

    def death(self) -> str:
        """Say how it ended, in a line."""
        code = self.process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"its process: {how}{': ' + self.errors[-1][:200] if self.errors else ''}"
