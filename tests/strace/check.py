"""Acknowledgements follow syncs, and failed writes and syncs are never acknowledged: seen from the system calls.

Syncs are delayed by strace before they run, so that an answer that does not wait for them comes visibly too early.
One unary write is in flight at a time; its data carries a marker by which it is found in the trace.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "blackbox"))

import calls as system_calls  # noqa: E402
import grpc  # noqa: E402
import pair  # noqa: E402
from pair import block, block_grpc, poll, types, volume, volume_grpc  # noqa: E402

BLOCK_BYTES = 4096
BLOCKS = 64
# Enough to reach the highest N below on the thread of the journal.
WRITES_MAX = 400
WATCHED_WRITES = 60
SYNC_DELAY_US = 20_000
TRACED = "trace=" + ",".join((*system_calls.WRITES, *system_calls.SYNCS, *system_calls.CREATES))
SYNC_CALLS = "fdatasync,fsync"
WRITE_CALLS = "pwrite64,pwritev,pwritev2"
EXIT_STORAGE = 74
SMALL = ("--staging-capacity", "64MiB")


def strace(output, injection, traced=TRACED):
    options = ["-f", "-y", "-T", "-ttt", "-s", "8192", "-o", str(output), "-e", traced]
    return ["strace", *options, "-e", f"inject={injection}"]


def marker(number):
    return f"MARK-{number:06}-"


def content(number):
    return (marker(number) * (BLOCK_BYTES // 12 + 1))[:BLOCK_BYTES].encode()


def create(node, name, ack=types.ACK_RULE_STAGED):
    with node.channel() as channel:
        request = volume.CreateVolumeRequest(name=name, size_bytes=BLOCKS * BLOCK_BYTES, ack=ack)
        volume_grpc.VolumeServiceStub(channel).CreateVolume(request, timeout=pair.PATIENCE_S)


def write_until_error(node, name, numbers):
    """One write after the other; `(number, time of request, of answer)` up to the first error."""
    acked = []
    with node.channel() as channel:
        stub = block_grpc.BlockServiceStub(channel)
        for number in numbers:
            request = block.WriteBlockRequest(
                volume=name, offset_bytes=number % BLOCKS * BLOCK_BYTES, data=content(number)
            )
            started = time.time()
            try:
                stub.WriteBlock(request, timeout=pair.PATIENCE_S)
            except grpc.RpcError:
                break
            acked.append((number, started, time.time()))
    return acked


def traced_pair(bin_dir, directory, injection):
    """Runs a pair under strace with a volume for each rule. Returns the violations, and those that there would be if
    each answer had come half a sync's time after its request."""
    nodes, traces = [], {role: directory / f"{role}.strace" for role in ("backup", "primary")}
    try:
        args = SMALL
        for role in ("backup", "primary"):
            node = pair.Node(bin_dir, role, directory / role, *args, prefix=strace(traces[role], injection))
            nodes.append(node)
            node.wait_ready()
            args = (*SMALL, "--backup-url", f"http://{node.ready['replica'] or node.address}")
        backup, primary = nodes
        create(primary, "staged")
        create(primary, "both", types.ACK_RULE_BOTH)
        staged = write_until_error(primary, "staged", range(WATCHED_WRITES))
        both = write_until_error(primary, "both", range(WATCHED_WRITES, 2 * WATCHED_WRITES))
        for node in (primary, backup):
            node.terminate()
    finally:
        for node in nodes:
            node.kill()
    made = {role: system_calls.parse(file.read_text(errors="replace").splitlines()) for role, file in traces.items()}
    assert len(staged) == len(both) == WATCHED_WRITES, f"{len(staged)} and {len(both)} of {WATCHED_WRITES} acknowledged"

    def violations(time_of):
        judge = lambda role, acks: [
            f"{role}: {v}"
            for v in system_calls.violations(made[role], [(marker(ack[0]), time_of(ack)) for ack in acks])
        ]
        return judge("primary", staged + both) + judge("backup", both)

    return violations(lambda ack: ack[2]), violations(lambda ack: ack[1] + SYNC_DELAY_US / 2e6)


# Every `staged` write has one sync to wait for, every `both` write two.
ALL = 3 * WATCHED_WRITES


def acks_follow_syncs(bin_dir):
    with tempfile.TemporaryDirectory(prefix="understudy-strace-") as directory:
        injection = f"{SYNC_CALLS}:delay_enter={SYNC_DELAY_US}"
        found, if_early = traced_pair(bin_dir, Path(directory), injection)
    assert not found, f"{len(found)} acknowledgements came too early, first: {found[0]}"
    assert len(if_early) == ALL, f"the analysis would have noticed {len(if_early)} of {ALL} early answers"


def skipped_syncs_are_noticed(bin_dir):
    """The control: with every sync skipped, the analysis has to object to every single acknowledgement."""
    with tempfile.TemporaryDirectory(prefix="understudy-strace-") as directory:
        found, _ = traced_pair(bin_dir, Path(directory), f"{SYNC_CALLS}:retval=0")
    assert len(found) == ALL, f"{len(found)} of {ALL} missing syncs were noticed"


def nth_call_fails(bin_dir, calls, error, nth):
    """The Nth of `calls` of each thread fails once: exit code 74, and what was acknowledged is there afterwards."""
    with tempfile.TemporaryDirectory(prefix="understudy-strace-") as directory:
        data_dir = Path(directory) / "primary"
        node = pair.Node(bin_dir, "primary", data_dir, *SMALL).wait_ready()
        create(node, "volume")
        first = write_until_error(node, "volume", range(10))
        node.terminate()
        node.kill()

        prefix = strace(Path(directory) / "calls.strace", f"{calls}:error={error}:when={nth}", f"trace={calls}")
        node = pair.Node(bin_dir, "primary", data_dir, *SMALL, prefix=prefix)
        try:
            poll("ready or ended", lambda: node.process.poll() is not None or node.ready_file.exists())
            acked = []
            if node.process.poll() is None:
                node.wait_ready()
                acked = write_until_error(node, "volume", range(10, WRITES_MAX))
            try:
                code = node.wait_exit(20)
            except subprocess.TimeoutExpired:
                raise AssertionError(f"still running after {len(acked)} acknowledged writes") from None
            assert code == EXIT_STORAGE, f"exit code {code}, expected {EXIT_STORAGE}:\n{node.log_tail()}"
            assert len(acked) < WRITES_MAX - 10, "every write was acknowledged: the fault was not reached"
        finally:
            node.kill()

        node = pair.Node(bin_dir, "primary", data_dir, *SMALL).wait_ready()
        try:
            check_contents(node, [number for number, *_ in first + acked])
        finally:
            node.kill()


def check_contents(node, acked):
    """Each block holds what was acknowledged last, or the one write after all of them, whose outcome is not known."""
    unknown = acked[-1] + 1
    with node.channel() as channel:
        stub = block_grpc.BlockServiceStub(channel)
        for place in range(BLOCKS):
            last = [number for number in acked if number % BLOCKS == place][-1:]
            allowed = [content(number) for number in last] or [bytes(BLOCK_BYTES)]
            if unknown % BLOCKS == place:
                allowed.append(content(unknown))
            request = block.ReadBlockRequest(
                volume="volume", offset_bytes=place * BLOCK_BYTES, length_bytes=BLOCK_BYTES
            )
            data = stub.ReadBlock(request, timeout=pair.PATIENCE_S).data
            assert data in allowed, f"block {place} holds {data[:12]!r}, expected {[a[:12] for a in allowed]}"


def main(bin_dir):
    checks = pair.Checks()
    checks.run("each acknowledgement follows its syncs", lambda: acks_follow_syncs(bin_dir))
    checks.run("control: skipped syncs are noticed", lambda: skipped_syncs_are_noticed(bin_dir))
    for calls in (SYNC_CALLS, WRITE_CALLS):
        for error in ("EIO", "ENOSPC"):
            for nth in (1, 2, 5, 20):
                name = f"{error} at call {nth} of {calls}: exit 74, nothing acknowledged is lost"
                checks.run(name, lambda c=calls, e=error, n=nth: nth_call_fails(bin_dir, c, e, n))
    return checks.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
