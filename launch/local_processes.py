"""Runs a command as several processes on this machine, which talk over loopback as the hosts of a cluster would.

`armd train` is given the coordinator's address, the number of processes and its own id. In any other command,
{coordinator}, {processes} and {process} are replaced by them. The exit code is that of the process that failed first.
"""

import argparse
import collections
import contextlib
import io
import os
import queue
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO, NoReturn

LAST_LINES = 10  # lines of a failed process's standard error that are shown again at the end
# Passed on to every process. SIGHUP says that the terminal was lost (and is ignored under `nohup`); SIGUSR2 is what a
# scheduler can be told to send ahead of a time limit.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)
SAVED = 75  # exit code of a process that was stopped and saved, which is no failure


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is one line, with exit code 2."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (see python {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options and, as `command`, the words after `--`."""
    parser = Parser(
        prog="launch/local_processes.py",
        description=__doc__,
        usage="python %(prog)s [options] -- armd train --config=FILE --workdir=FOLDER ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=int, default=2, help="number of processes; default 2")
    parser.add_argument("--devices-per-process", type=int, default=1, help="virtual CPU devices per process; default 1")
    parser.add_argument("--port", type=int, default=0, help="of the coordinator; default: a free one")
    parser.add_argument(
        "--grace",
        type=float,
        default=60,
        help="seconds from SIGTERM to SIGKILL; must be longer than a checkpoint takes; default 60",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the processes' commands instead of running them")
    parser.add_argument("command", nargs="*", help="after --: the command of every process")
    args = parser.parse_args(argv)
    if not args.command:
        parser.error("the command is missing: end with -- armd train --config=FILE --workdir=FOLDER")
    if args.processes < 1 or args.devices_per_process < 1 or args.grace <= 0:
        parser.error("--processes, --devices-per-process and --grace must be positive")
    if not args.dry_run and shutil.which(args.command[0]) is None:
        parser.error(f"no program {args.command[0]!r} on PATH; activate the environment it is installed in")
    return args


def free_port() -> int:
    """A port of this machine that nothing listens on now.

    Another program could still take it before the coordinator does, which would then fail at its start.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def process_command(command: Sequence[str], coordinator: str, processes: int, process: int) -> list[str]:
    """The command of one process."""
    if list(command[:2]) == ["armd", "train"]:
        return [*command, f"--coordinator={coordinator}", f"--num-processes={processes}", f"--process-id={process}"]
    values = {"{coordinator}": coordinator, "{processes}": str(processes), "{process}": str(process)}
    words = []
    for word in command:
        for name, value in values.items():
            word = word.replace(name, value)
        words.append(word)
    return words


def extra_environment(devices_per_process: int) -> dict[str, str]:
    """Variables that every process has in addition to this one's environment.

    Several processes on one machine are a rehearsal on virtual CPU devices, unless JAX_PLATFORMS is set. Output is
    unbuffered, so that lines arrive when they are printed.
    """
    return {
        "JAX_NUM_CPU_DEVICES": str(devices_per_process),
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
        "PYTHONUNBUFFERED": "1",
    }


class Group:
    """The started processes: their output, their ends, and the signals to them."""

    def __init__(self) -> None:
        self.children: list[subprocess.Popen[str]] = []
        self.ended: queue.Queue[tuple[int, int]] = queue.Queue()  # (process, exit code), in the order of their ends
        self.last_lines: list[collections.deque[str]] = []
        self.readers: list[threading.Thread] = []
        self.output = threading.Lock()
        self.kill_at: float | None = None  # time.monotonic() at which processes that still run are killed

    def start(self, command: Sequence[str], environment: dict[str, str]) -> None:
        """Starts the next process, in a session of its own: Ctrl-C then reaches it once, passed on from here."""
        process = len(self.children)
        child = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert child.stdout is not None and child.stderr is not None
        self.children.append(child)
        self.last_lines.append(collections.deque(maxlen=LAST_LINES))
        for source, target in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
            self.readers.append(threading.Thread(target=self._copy, args=(process, source, target), daemon=True))
            self.readers[-1].start()
        threading.Thread(target=lambda: self.ended.put((process, child.wait())), daemon=True).start()

    def _copy(self, process: int, source: IO[str], target: IO[str]) -> None:
        for line in source:
            line = f"[{process}] {line.rstrip()}"
            if target is sys.stderr:
                self.last_lines[process].append(line)
            # The reader of our output, the terminal or the space for a log may be gone. The process's output must still
            # be read, or the process would block.
            with self.output, contextlib.suppress(OSError):
                print(line, file=target, flush=True)

    def signal(self, number: int, grace: float) -> None:
        """Passes a signal on to every process that still runs. Those left after `grace` seconds will be killed."""
        for child in self.children:
            if child.poll() is None:
                child.send_signal(number)
        if self.kill_at is None:
            self.kill_at = time.monotonic() + grace

    def kill(self) -> None:
        """Kills what is left of the processes and their children."""
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)

    def wait(self, grace: float) -> tuple[int, int] | None:
        """Waits until all processes have ended.

        After the first failure, the others are ended within `grace` seconds. Returns that failure as (process, exit
        code), or None if all ended with code 0.
        """
        failed = None
        running = len(self.children)
        while running:
            try:
                process, code = self.ended.get(timeout=0.1)  # short, because a signal may set kill_at in the meantime
            except queue.Empty:
                if self.kill_at is not None and time.monotonic() > self.kill_at:
                    say(f"still running after {grace:g} s: killed")
                    self.kill()
                    self.kill_at = time.monotonic() + grace  # SIGKILL takes effect at once, but try again in any case
                continue
            running -= 1
            if code and failed is None:
                failed = process, 128 - code if code < 0 else code  # as a shell reports a signal
                if running and self.kill_at is None:
                    say(f"process {process} ended with code {failed[1]}: ending the others")
                    self.signal(signal.SIGTERM, grace)
        last_lines_by = time.monotonic() + 2  # not for ever, because a grandchild may keep a pipe open
        for reader in self.readers:
            reader.join(timeout=max(last_lines_by - time.monotonic(), 0))
        return failed


def say(text: str) -> None:
    """Prints one line about the group on standard error."""
    with contextlib.suppress(OSError):
        print(f"local_processes: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the group; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A character that the terminal lacks must not end the copying of lines.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    args = parse(argv)
    coordinator = f"127.0.0.1:{args.port or free_port()}"
    environment = extra_environment(args.devices_per_process)
    commands = [process_command(args.command, coordinator, args.processes, i) for i in range(args.processes)]
    if args.dry_run:
        settings = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
        print("\n".join(" ".join([*settings, shlex.join(command)]) for command in commands))
        return 0
    group = Group()
    for number in STOPPING:
        if number in (signal.SIGTERM, signal.SIGINT) or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda received, _: group.signal(received, args.grace))
    try:
        for command in commands:
            if group.kill_at is None:  # no signal came yet
                group.start(command, environment)
        failed = group.wait(args.grace)
    except BaseException:
        group.kill()
        raise
    if failed is None:
        return 0
    group.kill()  # processes that the processes themselves started
    process, code = failed
    if code != SAVED:
        say(f"process {process} failed first, with code {code}; its last lines:")
        with contextlib.suppress(OSError):
            print("\n".join(group.last_lines[process]), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
