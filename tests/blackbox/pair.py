"""Starts real services and speaks to them with stubs made from the .proto files. Used by all outside checks."""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grpc
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[2]
# Longest wait for a service to start, recover or stop.
PATIENCE_S = 60


def load_stubs(out):
    """Generates Python code from proto/ into the directory `out` and imports it. Returns a name -> module map."""
    files = sorted(str(p.relative_to(ROOT / "proto")) for p in (ROOT / "proto").rglob("*.proto"))
    code = protoc.main(["protoc", f"-I{ROOT / 'proto'}", f"--python_out={out}", f"--grpc_python_out={out}", *files])
    if code != 0:
        sys.exit(f"protoc failed with {code}")
    sys.path.insert(0, out)
    modules = {}
    for file in files:
        name = file.removesuffix(".proto")
        for suffix in ("_pb2", "_pb2_grpc"):
            modules[Path(name).name + suffix] = importlib.import_module((name + suffix).replace("/", "."))
    return modules


with tempfile.TemporaryDirectory(prefix="understudy-stubs-") as _directory:
    STUBS = load_stubs(_directory)
block, block_grpc = STUBS["block_pb2"], STUBS["block_pb2_grpc"]
volume, volume_grpc = STUBS["volume_pb2"], STUBS["volume_pb2_grpc"]
replication, replication_grpc = STUBS["replication_pb2"], STUBS["replication_pb2_grpc"]
types = STUBS["types_pb2"]


def _crc_table():
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _crc_table()


def crc32c(data):
    """CRC32C (Castagnoli), as RFC 3720 has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def poll(what, condition, patience_s=PATIENCE_S):
    """Calls `condition` until it returns something true, which is returned; raises after `patience_s`."""
    deadline = time.monotonic() + patience_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {patience_s} s")
        time.sleep(0.02)


class Node:
    """One running service: `role` is "primary" or "backup". `prefix` is put before the command (strace)."""

    def __init__(self, bin_dir, role, directory, *args, prefix=()):
        self.role = role
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.ready_file = self.directory.parent / f"{role}.ready"
        self.ready_file.unlink(missing_ok=True)
        self.log = open(self.directory.parent / f"{role}.log", "ab")
        command = [
            *prefix,
            str(Path(bin_dir).resolve() / f"understudy-{role}"),
            *("--data-dir", str(self.directory)),
            *("--listen", "127.0.0.1:0"),
            *("--admin-listen", "127.0.0.1:0"),
            *("--ready-file", str(self.ready_file)),
            *args,
        ]
        # Variables meant for the tests would be settings to the service.
        env = {name: value for name, value in os.environ.items() if not name.startswith("UNDERSTUDY_")}
        # A session of its own, so that `kill` reaches the service also when it runs below another program.
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, env=env, start_new_session=True
        )
        self.ready = None

    def wait_ready(self):
        """Waits for the ready file; raises with the end of the log when the service ended instead."""

        def ready():
            if self.process.poll() is not None:
                raise RuntimeError(f"{self.role} ended with {self.process.returncode}:\n{self.log_tail()}")
            try:
                return json.loads(self.ready_file.read_text())
            except (FileNotFoundError, json.JSONDecodeError):
                return None

        self.ready = poll(f"{self.role} is ready", ready)
        return self

    @property
    def address(self):
        return self.ready["grpc"]

    def log_tail(self):
        return "\n".join(Path(self.log.name).read_text(errors="replace").splitlines()[-15:])

    def channel(self, **options):
        return grpc.insecure_channel(self.address, options=list(options.items()))

    def wait_exit(self, patience_s=PATIENCE_S):
        return self.process.wait(timeout=patience_s)

    def terminate(self):
        """SIGTERM to the service itself (not to what runs it), and its exit code."""
        if self.process.poll() is None:
            os.kill(self.ready["pid"] if self.ready else self.process.pid, signal.SIGTERM)
        return self.wait_exit()

    def kill(self):
        """SIGKILL to the service and what runs it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()


class Pair:
    """A backup and a primary that replicates to it, in a temporary directory."""

    def __init__(self, bin_dir, *primary_args):
        self.directory = tempfile.TemporaryDirectory(prefix="understudy-pair-")
        root = Path(self.directory.name)
        self.nodes = []
        try:
            self.backup = self._start(bin_dir, "backup", root / "backup")
            url = f"http://{self.backup.ready['replica'] or self.backup.address}"
            self.primary = self._start(bin_dir, "primary", root / "primary", "--backup-url", url, *primary_args)
        except BaseException:
            self.__exit__()
            raise

    def _start(self, *args):
        node = Node(*args)
        self.nodes.append(node)
        return node.wait_ready()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for node in self.nodes:
            node.kill()
        self.directory.cleanup()


class Checks:
    """Counts what passed and failed; a check that raises has failed, the others go on."""

    def __init__(self):
        self.passed = 0
        self.failed = 0

    def run(self, name, check):
        try:
            check()
        except Exception as error:  # noqa: BLE001 - whatever it was, the check failed and says so
            self.failed += 1
            detail = f"{error.code()}: {error.details()}" if isinstance(error, grpc.RpcError) else repr(error)
            print(f"FAILED {name}: {detail}", flush=True)
        else:
            self.passed += 1
            print(f"ok     {name}", flush=True)

    def finish(self):
        """Prints the last line and returns the exit code."""
        print(f"{self.passed} passed, {self.failed} failed", flush=True)
        return 1 if self.failed or not self.passed else 0
