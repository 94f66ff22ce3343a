"""Several worker processes on this machine, none of which is left behind."""

import contextlib
import json
import os
import socket
import subprocess
import time


@contextlib.contextmanager
def cluster(command, count, folder):
    """Run a command as every worker of a cluster on the loopback address.

    Each gets its own TF_CONFIG and no GPU, which two processes could not share. What
    worker `i` prints goes to `worker_i.log`. Whoever still runs at the end is killed.

    Args:
        command: list of strings.
        count: how many workers to start.
        folder: path of a folder for the logs.

    Yields:
        A list of `Worker`.
    """
    addresses = [f"127.0.0.1:{port}" for port in _free_ports(count)]
    with contextlib.ExitStack() as stack:
        workers = []
        for index in range(count):
            config = {
                "cluster": {"worker": addresses},
                "task": {"type": "worker", "index": index},
            }
            log = folder / f"worker_{index}.log"
            environment = {
                **os.environ,
                "TF_CONFIG": json.dumps(config),
                "CUDA_VISIBLE_DEVICES": "-1",
            }
            with open(log, "wb") as file:
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            workers.append(Worker(process, log))
            stack.callback(workers[-1].kill)
        yield workers


class WorkerError(Exception):
    """A worker did not do what it should; the message ends with the end of its log."""


class Worker:
    """A process and its log."""

    def __init__(self, process, log):
        self.process, self.log = process, log

    def wait(self, seconds):
        """The exit status; TimeoutExpired if there is none within the seconds."""
        return self.process.wait(seconds)

    def check(self, seconds):
        """Wait until it ends; WorkerError if it does not, or not well."""
        try:
            status = self.wait(seconds)
        except subprocess.TimeoutExpired:
            raise self._error(f"has not ended within {seconds} s") from None
        if status:
            raise self._error(f"ended with status {status}")

    def wait_for(self, path, seconds):
        """Wait until it has written a file; WorkerError if it does not."""
        until = time.monotonic() + seconds
        while not path.exists():
            if self.process.poll() is not None:
                raise self._error(f"ended without writing {path.name}")
            if time.monotonic() > until:
                raise self._error(f"has not written {path.name} within {seconds} s")
            time.sleep(0.02)

    def kill(self):
        """End it at once, as a machine does that loses its power."""
        self.process.kill()
        self.process.wait()

    def lines(self, seconds):
        """What it prints, line by line as it comes, until it has ended.

        Args:
            seconds: how long it may be silent.

        Raises:
            WorkerError: when it was silent for longer.
        """
        with open(self.log, encoding="utf-8", errors="replace") as file:
            line, since = "", time.monotonic()
            while True:
                ended = self.process.poll() is not None
                if part := file.readline():
                    since = time.monotonic()
                    line += part
                    if line.endswith("\n"):
                        yield line.rstrip("\n")
                        line = ""
                elif ended:
                    break
                elif time.monotonic() - since > seconds:
                    raise self._error(f"was silent for {seconds} s")
                else:
                    time.sleep(0.02)
        if line:
            yield line

    def _error(self, what):
        tail = self.log.read_text(errors="replace").splitlines()[-20:]
        return WorkerError("\n".join([f"A worker {what}. {self.log} ends:", *tail]))


def _free_ports(count):
    """Ports that the system says nobody uses."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
