"""Python programs that start at once: forks of one process that has imported what others wrote, PyTorch above all.

`run` and `start` take what follows `python` on a command line. The fork has its own arguments, environment, folder,
outputs and limits, and imports fastdiff itself. It ends as any program does, but does not take its modules apart. A
test of that, or of what PyTorch, Triton or an environment is at the start of Python, takes `subprocess` instead. Triton
in a fork is the compiler, not the interpreter.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from typing import IO, Any

# What the command `fastdiff` imports of others. Not numba, which reads the environment as it is imported.
IMPORTED = ("torch._dynamo", "torch.distributed.checkpoint", "sklearn.datasets", "safetensors.torch", "PIL.Image")
# A thread in the server would be missing in its forks.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
HIDDEN = ("TRITON_INTERPRET", "FASTDIFF_BACKEND")

# Processor time of the server's imports and of the programs that have ended, in seconds.
spent = 0.0


class Program:
    """A program that runs, with the part of subprocess.Popen that tests need."""

    def __init__(self, reply: socket.socket, stdout: IO[bytes] | None, stderr: IO[bytes] | None) -> None:
        self.reply = reply.makefile("r")
        self.pid = int(self.reply.readline())
        self.stdout, self.stderr = stdout, stderr
        self.returncode: int | None = None

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        global spent
        if self.returncode is None:
            status, seconds = self.reply.readline().split()
            self.reply.close()
            self.returncode = os.waitstatus_to_exitcode(int(status))
            spent += float(seconds)
        return self.returncode


def start(
    *args: object,
    env: dict[str, str] | None = None,
    cwd: object = None,
    stdout: int | None = None,
    stderr: int | None = None,
    file_size: int | None = None,
) -> Program:
    """Start a program; an output that gets no descriptor is a pipe. `file_size` limits what it writes to a file."""
    mine, theirs = socket.socketpair()
    request = {"args": [str(arg) for arg in args], "env": dict(os.environ if env is None else env)}
    request |= {"cwd": str(cwd or os.getcwd()), "file_size": file_size}
    pipes: list[IO[bytes] | None] = []
    ends = []
    for descriptor in (stdout, stderr):
        read, write = os.pipe() if descriptor is None else (None, os.dup(descriptor))
        pipes.append(None if read is None else os.fdopen(read, "rb", buffering=0))
        ends.append(write)
    with tempfile.TemporaryFile() as written, theirs:
        written.write(json.dumps(request).encode())
        written.flush()
        socket.send_fds(server(), [b"r"], [written.fileno(), *ends, theirs.fileno()])
        for end in ends:
            os.close(end)
        with mine:
            return Program(mine, *pipes)


def run(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end; its outputs are in the result, but for one that got a descriptor."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        files = {"stdout": out.fileno(), "stderr": err.fileno()} | options
        code = start(*args, **files).wait()
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read().decode())
    return subprocess.CompletedProcess(args, code, *said)


@functools.cache
def server() -> socket.socket:
    """The connection to the server, which ends with it."""
    global spent
    mine, theirs = socket.socketpair()
    environment = {name: value for name, value in os.environ.items() if name not in HIDDEN} | ONE_THREAD
    command = [sys.executable, __file__, str(theirs.fileno())]
    process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    theirs.close()
    spent += float(mine.recv(100))
    atexit.register(lambda: (mine.close(), process.wait()))
    return mine


# --- the server -----------------------------------------------------------------------------------------------------


def serve(requests: socket.socket) -> dict[str, Any]:
    """Fork for each request. Returns what is asked for, in the fork alone."""
    for name in IMPORTED:
        with contextlib.suppress(ModuleNotFoundError):  # a machine with a GPU need not have all of them
            importlib.import_module(name)
    if os.path.exists("/proc/self/task"):
        threads = len(os.listdir("/proc/self/task"))
        assert threads == 1, f"expected one thread after the imports, got {threads}"
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that watch
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    requests.send(str(usage.ru_utime + usage.ru_stime).encode())
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 1, 4)
        if not message:
            sys.exit()
        if os.fork() == 0:
            requests.close()
            return watch(*descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def watch(request: int, out: int, err: int, reply: int) -> dict[str, Any]:
    """Fork the program, say how it ends, and end. Returns in the program alone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    program = os.fork()
    if program == 0:
        os.close(reply)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.close(out)
        os.close(err)
        with open(request, "rb") as file:
            file.seek(0)
            return json.load(file)
    os.close(out)
    os.close(err)
    os.write(reply, f"{program}\n".encode())
    _, status, usage = os.wait4(program, 0)
    os.write(reply, f"{status} {usage.ru_utime + usage.ru_stime}\n".encode())
    os._exit(0)


def become(args: list[str], env: dict[str, str], cwd: str, file_size: int | None) -> None:
    """What Python does with a command line."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    sys.path[1:1] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    if args[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *args[2:]], ""
        exec(compile(args[1], "<string>", "exec"), {"__name__": "__main__"})
    elif args[0] == "-m":
        sys.argv, sys.path[0] = args[1:], cwd
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = args, os.path.dirname(args[0])
        runpy.run_path(args[0], run_name="__main__")


def leave(code: int) -> None:
    """What Python does at its end, but for taking modules apart: that copies the memory that the forks share."""
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        sys.exit(code)  # Python says what is wrong with them
    os._exit(code & 0xFF)


if __name__ == "__main__":
    try:
        become(**serve(socket.socket(fileno=int(sys.argv[1]))))
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        leave(end.code or 0)
    leave(0)
