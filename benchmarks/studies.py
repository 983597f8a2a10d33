"""Runs of a study: done once, kept in a file, a few at a time in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class Study:
    """The runs of one folder's ``runs.jsonl``.

    Args:
        folder: made if it is not there.
        script: does one run: called with ``--one RUN`` as JSON, it prints the result as its last line.
        workers: processes at a time.
        extra: further arguments of the script.
        key: what makes two runs, or a run and its result, the same.
        shown: keys of a result that are printed; all by default.
    """

    def __init__(
        self,
        folder: Path,
        script: str,
        *,
        workers: int,
        extra: Sequence[str],
        key: Callable[[dict], tuple],
        shown: Sequence[str] = (),
    ) -> None:
        self.file = folder / "runs.jsonl"
        self.key, self._shown = key, shown
        self._command, self._workers, self._extra = [sys.executable, script, "--one"], workers, extra
        folder.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        self.done: dict[tuple, dict[str, Any]] = {key(run): run for run in map(json.loads, lines)}

    def results(self, wanted: Sequence[dict]) -> list[dict]:
        """Return the result of every run in `wanted`, after doing those that are missing."""
        waiting = list({self.key(run): run for run in wanted if self.key(run) not in self.done}.values())
        running: list[tuple[dict, subprocess.Popen]] = []
        while waiting or running:
            while waiting and len(running) < self._workers:
                run = waiting.pop(0)
                command = [*self._command, json.dumps(run), *self._extra]
                running.append((run, subprocess.Popen(command, stdout=subprocess.PIPE, text=True)))
            for run, process in list(running):
                if process.poll() is None:
                    continue
                running.remove((run, process))
                if process.returncode:
                    sys.exit(f"{run} failed")
                self._keep(json.loads(process.stdout.read().splitlines()[-1]))
            time.sleep(0.2)
        return [self.done[self.key(run)] for run in wanted]

    def _keep(self, result: dict) -> None:
        self.done[self.key(result)] = result
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(json.dumps({key: result[key] for key in self._shown or result}), flush=True)
