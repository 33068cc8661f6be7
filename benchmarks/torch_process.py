"""torch in a process of its own: neither's threads and memory are in the other's way.

It runs with the Python that has torch: this one, or that of `make test-torch`.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PYTHONS = (Path(sys.executable), ROOT / ".venv-torch/bin/python")


class TorchProcess:
    """Runs `benchmarks.torch_training`, and ends it; `missing` says why there is no torch."""

    def __init__(self) -> None:
        self.missing, self.version, self._process = "", None, None
        python = next((p for p in PYTHONS if p.exists() and _has_torch(p)), None)
        if python is None:
            self.missing = "neither this Python nor .venv-torch has it; make test-torch installs it"
            return
        command = [str(python), "-m", "benchmarks.torch_training"]
        self._process = subprocess.Popen(
            command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.version = self._answer()["torch"]

    def __enter__(self) -> "TorchProcess":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.communicate()

    def build(
        self, name: str, network: str, batch: int, activation: str, way: str, layout: str
    ) -> dict[str, Any]:
        """Builds a step and does it once; returns the number of parameters, or an error."""
        compiled = way == "compiled"
        asked = {"network": network, "batch": batch, "activation": activation}
        return self._ask({"name": name, "build": {**asked, "layout": layout, "compiled": compiled}})

    def processor_time(self) -> float:
        """Returns the seconds that its threads have computed for."""
        if self._process is None:
            return 0.0
        # What clock_getcpuclockid(3) gives for a process on Linux.
        return time.clock_gettime(~self._process.pid << 3 | 2)

    def step(self, name: str) -> Callable[[], None]:
        """Returns the call of a step that was built, which waits for it."""

        def call() -> None:
            if "error" in (found := self._ask({"step": name})):
                raise RuntimeError(f"{name}: {found['error']}")

        return call

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process is not None and self._process.stdin is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process with torch ended; its last lines are above")
        return json.loads(line)


def _has_torch(python: Path) -> bool:
    command = [str(python), "-c", "import torch"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
