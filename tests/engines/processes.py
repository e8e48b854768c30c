"""An engine in a process of its own, in an environment of its own: orders go in and answers come out as lines of JSON."""
import json
import os
import subprocess
import tempfile
import threading
from pathlib import Path

HERE = Path(__file__).parent


class Engine:
    """python: of the engine's environment; script: a file of this folder. Started with the first order, and again after a crash."""

    def __init__(self, python: str, script: str, *arguments: str, seconds: int = 300):
        self.command = [python, str(HERE / script), *arguments]
        self.seconds = seconds
        self.process, self.log = None, None

    def ask(self, **order) -> dict:
        """The answer; AssertionError with the engine's last words if it fails, dies or takes longer than `seconds`."""
        if self.process is None or self.process.poll() is not None:
            self._start()
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        watch = threading.Timer(self.seconds, self.process.kill)
        watch.start()
        try:
            line = next((line for line in self.process.stdout if line.startswith("ANSWER ")), None)
        finally:
            watch.cancel()
        assert line is not None, f"{self.command[1]} died, or took over {self.seconds} s, at {order['folder']}\n{self._last_words()}"
        answer = json.loads(line.removeprefix("ANSWER "))
        assert "error" not in answer, f"{order['folder']}: {answer['error']}\n{self._last_words()}"
        return answer

    def stop(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
            self.process.stdout.close()

    def _start(self) -> None:
        # One thread: waiting threads of OpenMP spin, and starve whatever else runs on the machine.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        self.log = tempfile.TemporaryFile(mode="w+")
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
                                        env=environment)

    def _last_words(self) -> str:
        self.log.seek(0)
        return "".join(self.log.readlines()[-15:])
