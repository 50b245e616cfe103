"""An independent gRPC client against a real pair: what is promised to clients, bad input, and hostile peers."""

import itertools
import random
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import hostile
import pair
from pair import block, block_grpc, crc32c, poll, replication, replication_grpc, types, volume, volume_grpc

MIB = 1 << 20
TIMEOUT_S = 20
CODE = grpc.StatusCode


def refused(call, *codes):
    """`call` must fail with one of `codes` and a message."""
    try:
        answer = call()
    except grpc.RpcError as error:
        assert error.code() in codes, f"{error.code()} ({error.details()}), expected {codes}"
        assert error.details(), "the refusal has no message"
        return error.details()
    raise AssertionError(f"accepted with {answer!r}, expected {codes}")


class Client:
    """The stubs of one pair and short forms of its calls."""

    def __init__(self, primary, backup):
        # Our own limit is above the server's, so that it is the server which refuses.
        unlimited = {"grpc.max_send_message_length": -1, "grpc.max_receive_message_length": -1}
        self.to_primary = primary.channel(**unlimited)
        self.to_backup = backup.channel(**unlimited)
        self.blocks = block_grpc.BlockServiceStub(self.to_primary)
        self.volumes = volume_grpc.VolumeServiceStub(self.to_primary)
        self.status = replication_grpc.ReplicationServiceStub(self.to_primary)
        self.copy = replication_grpc.BackupServiceStub(self.to_backup)

    def create(self, name, size=8 * MIB, **fields):
        return self.volumes.CreateVolume(
            volume.CreateVolumeRequest(name=name, size_bytes=size, **fields), timeout=TIMEOUT_S
        )

    def write(self, name, offset, data, **fields):
        request = block.WriteBlockRequest(volume=name, offset_bytes=offset, data=data, **fields)
        return self.blocks.WriteBlock(request, timeout=TIMEOUT_S)

    def read(self, name, offset, length):
        request = block.ReadBlockRequest(volume=name, offset_bytes=offset, length_bytes=length)
        answer = self.blocks.ReadBlock(request, timeout=TIMEOUT_S)
        assert answer.crc32c == crc32c(answer.data), "the checksum of the answer is wrong"
        return answer.data

    def read_stream(self, name):
        return collect(self.blocks.ReadBlocks(block.ReadBlocksRequest(volume=name), timeout=TIMEOUT_S))

    def read_copy(self, name):
        return collect(self.copy.ReadBlocks(replication.ReadImageRequest(volume=name), timeout=TIMEOUT_S))

    def on_backup(self, name):
        """The backup's image of `name` once it holds everything the primary has acknowledged."""

        def caught_up():
            status = self.status.GetStatus(replication.GetStatusRequest(), timeout=TIMEOUT_S)
            mine = [v for v in status.volumes if v.name == name]
            return status.link.state == "attached" and mine and mine[0].bytes_at_risk == 0

        poll(f"the backup holds all of {name}", caught_up)
        return self.read_copy(name)


def collect(answers):
    """Joins the chunks of a read; they must be in order, without gaps, of one position, with right checksums."""
    image, positions = bytearray(), set()
    for answer in answers:
        assert answer.offset_bytes == len(image), f"chunk at {answer.offset_bytes}, expected {len(image)}"
        positions.add((answer.position.generation, answer.position.lsn))
        if answer.WhichOneof("content") == "zero_bytes":
            image += bytes(answer.zero_bytes)
        else:
            assert answer.crc32c == crc32c(answer.data), "the checksum of a chunk is wrong"
            image += answer.data
    assert len(positions) <= 1, f"several positions in one answer: {positions}"
    return bytes(image)


def promises(checks, client):
    rng = random.Random(7)
    payload = rng.randbytes(64 * 1024)
    write_size = 8 * MIB

    def round_trip():
        made = client.create("round-trip")
        assert made.id > 0 and made.block_bytes == 4096 and made.size_bytes == write_size, made
        answer = client.write("round-trip", 4096, payload, crc32c=crc32c(payload))
        assert answer.position.lsn > 0 and answer.position.generation > 0, answer
        assert answer.durability != types.DURABILITY_UNSPECIFIED and not answer.duplicate, answer
        assert client.read("round-trip", 4096, len(payload)) == payload
        by_id = block.ReadBlockRequest(volume_id=made.id, offset_bytes=4096, length_bytes=16)
        assert client.blocks.ReadBlock(by_id, timeout=TIMEOUT_S).data == payload[:16]

    checks.run("a write is read back, by name and by id", round_trip)

    def partial_blocks():
        client.create("partial")
        client.write("partial", 0, b"\xaa" * 8192)
        client.write("partial", 4000, b"\xbb" * 200)
        assert client.read("partial", 0, 8192) == b"\xaa" * 4000 + b"\xbb" * 200 + b"\xaa" * 3992

    checks.run("an unaligned write changes its bytes and no others", partial_blocks)
    checks.run(
        "what was never written reads as zeros",
        lambda: assert_equal(client.read("round-trip", write_size - 4096, 4096), bytes(4096)),
    )

    def discard_and_zeroes():
        client.create("zeroes", MIB)
        client.write("zeroes", 0, b"\x11" * 65536)
        client.blocks.Discard(block.DiscardRequest(volume="zeroes", offset_bytes=0, length_bytes=8192))
        client.blocks.WriteZeroes(block.WriteZeroesRequest(volume="zeroes", offset_bytes=10000, length_bytes=100))
        want = bytearray(b"\x11" * 65536)
        want[0:8192], want[10000:10100] = bytes(8192), bytes(100)
        assert client.read("zeroes", 0, 65536) == bytes(want)

    checks.run("discarded blocks and zeroed bytes read as zeros", discard_and_zeroes)

    def streaming():
        client.create("stream", 4 * MIB)
        data = [rng.randbytes(4096) for _ in range(512)]
        requests = (
            block.WriteBlocksRequest(
                tag=1000 + i, write=block.WriteBlockRequest(volume="stream", offset_bytes=4096 * i, data=d)
            )
            for i, d in enumerate(data)
        )
        results = [r for answer in client.blocks.WriteBlocks(requests, timeout=60) for r in answer.results]
        assert [r.tag for r in results] == [1000 + i for i in range(512)], "results are missing or out of order"
        assert all(r.WhichOneof("outcome") == "written" for r in results), results[:3]
        lsns = [r.written.position.lsn for r in results]
        assert lsns == sorted(lsns), "positions do not grow"
        assert client.read_stream("stream")[: 512 * 4096] == b"".join(data)

    checks.run("512 writes on one stream are answered in order and read back", streaming)

    def stream_survives_refusals():
        writes = [
            block.WriteBlockRequest(volume="stream", offset_bytes=0, data=b"a" * 4096),
            block.WriteBlockRequest(volume="stream", offset_bytes=1 << 40, data=b"b" * 4096),
            block.WriteBlockRequest(volume="absent", offset_bytes=0, data=b"c" * 4096),
            block.WriteBlockRequest(volume="stream", offset_bytes=4096, data=b"d" * 4096),
        ]
        requests = (block.WriteBlocksRequest(tag=i, write=w) for i, w in enumerate(writes))
        results = [r for answer in client.blocks.WriteBlocks(requests, timeout=TIMEOUT_S) for r in answer.results]
        codes = [r.error.code if r.WhichOneof("outcome") == "error" else 0 for r in results]
        assert codes == [0, CODE.OUT_OF_RANGE.value[0], CODE.NOT_FOUND.value[0], 0], results
        assert client.read("stream", 4096, 4096) == b"d" * 4096

    checks.run("a refused write of a stream does not end the stream", stream_survives_refusals)

    def at_most_once():
        client.create("once", MIB)
        identity = {"client_id": "blackbox", "sequence": 1}
        first = client.write("once", 0, b"1" * 4096, **identity)
        client.write("once", 0, b"2" * 4096, client_id="blackbox", sequence=2)
        again = client.write("once", 0, b"1" * 4096, **identity)
        assert not first.duplicate and again.duplicate, (first, again)
        assert client.read("once", 0, 4096) == b"2" * 4096, "a repeated request was applied again"
        other = client.write("once", 0, b"3" * 4096, client_id="another", sequence=1)
        assert not other.duplicate, "sequences of two clients are mixed up"

    checks.run("a repeated sequence is applied once", at_most_once)

    def flush():
        before = client.write("once", 8192, b"f" * 4096)
        after = client.blocks.Flush(block.FlushRequest(volume="once"), timeout=TIMEOUT_S)
        assert after.position.lsn >= before.position.lsn, (before, after)

    checks.run("flush covers what was acknowledged before it", flush)

    def same_bytes():
        for name in ("round-trip", "partial", "zeroes", "stream", "once"):
            mine, copy = client.read_stream(name), client.on_backup(name)
            assert mine == copy, f"{name}: the images differ ({len(mine)} and {len(copy)} bytes)"

    checks.run("the backup serves the same bytes", same_bytes)

    def both():
        client.create("both", MIB, ack=types.ACK_RULE_BOTH)
        answer = client.write("both", 0, b"B" * 4096)
        assert answer.durability == types.DURABILITY_BOTH, answer

    checks.run("a volume with rule `both` answers when both are durable", both)

    def life_cycle():
        client.create("life", MIB)
        grown = client.volumes.ResizeVolume(volume.ResizeVolumeRequest(volume="life", size_bytes=2 * MIB))
        assert grown.size_bytes == 2 * MIB, grown
        client.write("life", 2 * MIB - 4096, b"e" * 4096)
        assert len(client.on_backup("life")) == 2 * MIB
        client.volumes.DeleteVolume(volume.DeleteVolumeRequest(volume="life"))
        refused(lambda: client.read("life", 0, 4096), CODE.NOT_FOUND)
        names = [v.name for v in client.volumes.ListVolumes(volume.ListVolumesRequest()).volumes]
        assert "life" not in names and "both" in names, names

    checks.run("a volume grows, is deleted, and the backup follows", life_cycle)

    def status():
        now = client.status.GetStatus(replication.GetStatusRequest(), timeout=TIMEOUT_S)
        assert now.role == "primary" and now.generation >= 1 and now.staging.capacity_bytes > 0, now
        copy = client.copy.GetStatus(replication.GetStatusRequest(), timeout=TIMEOUT_S)
        assert copy.role == "backup" and copy.pair_id == now.pair_id, (now.pair_id, copy)
        first = next(iter(client.status.WatchEvents(replication.WatchEventsRequest(), timeout=TIMEOUT_S)))
        assert first.kind == "state", first

    checks.run("both sides report their state and name the same pair", status)


def bad_input(checks, client):
    client.create("bad", MIB)

    def check(name, call, *codes):
        checks.run(f"refused: {name}", lambda: refused(call, *codes))

    data = b"x" * 4096
    check("a write past the end", lambda: client.write("bad", MIB, data), CODE.OUT_OF_RANGE)
    check("a write across the end", lambda: client.write("bad", MIB - 100, data), CODE.OUT_OF_RANGE)
    check("an offset that overflows", lambda: client.write("bad", 2**64 - 4096, data), CODE.OUT_OF_RANGE)
    check("a read past the end", lambda: client.read("bad", MIB, 4096), CODE.OUT_OF_RANGE)
    check("a write of nothing", lambda: client.write("bad", 0, b""), CODE.INVALID_ARGUMENT)
    check("a read of nothing", lambda: client.read("bad", 0, 0), CODE.INVALID_ARGUMENT)
    check("an unknown volume", lambda: client.write("absent", 0, data), CODE.NOT_FOUND)
    check("no volume at all", lambda: client.write("", 0, data), CODE.INVALID_ARGUMENT, CODE.NOT_FOUND)
    check("a name that exists", lambda: client.create("bad", MIB), CODE.ALREADY_EXISTS)
    check("a name with a slash", lambda: client.create("a/b", MIB), CODE.INVALID_ARGUMENT)
    check("a size of 0", lambda: client.create("empty", 0), CODE.INVALID_ARGUMENT)
    check("a size of half a block", lambda: client.create("half", 2048), CODE.INVALID_ARGUMENT)
    check("a block of 1000 bytes", lambda: client.create("odd", MIB, block_bytes=1000), CODE.INVALID_ARGUMENT)
    check("a sequence without a client", lambda: client.write("bad", 0, data, sequence=1), CODE.INVALID_ARGUMENT)
    check(
        "a client id of 65 bytes",
        lambda: client.write("bad", 0, data, client_id="c" * 65, sequence=1),
        CODE.INVALID_ARGUMENT,
    )
    check(
        "an oversized message",
        lambda: client.write("bad", 0, bytes(64 * MIB)),
        CODE.RESOURCE_EXHAUSTED,
        CODE.OUT_OF_RANGE,
    )
    check(
        "an oversized read",
        lambda: client.blocks.ReadBlock(block.ReadBlockRequest(volume="round-trip", length_bytes=1 << 40)),
        CODE.OUT_OF_RANGE,
        CODE.RESOURCE_EXHAUSTED,
        CODE.INVALID_ARGUMENT,
    )

    def wrong_checksum():
        client.write("bad", 0, b"good" * 1024)
        refused(lambda: client.write("bad", 0, data, crc32c=crc32c(data) ^ 1), CODE.INVALID_ARGUMENT, CODE.DATA_LOSS)
        assert client.read("bad", 0, 4096) == b"good" * 1024, "the refused write changed the volume"

    checks.run("refused: a wrong checksum, and nothing is written", wrong_checksum)

    def wrong_service():
        to_backup = block_grpc.BlockServiceStub(client.to_backup)
        call = lambda: to_backup.WriteBlock(block.WriteBlockRequest(volume="bad", data=data), timeout=TIMEOUT_S)
        refused(call, CODE.UNIMPLEMENTED, CODE.FAILED_PRECONDITION)

    checks.run("refused: a client's write to the backup", wrong_service)


def standard_services(checks, client):
    def healthy(channel):
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING, answer

    def services(channel, *wanted):
        listed = ProtoReflectionDescriptorDatabase(channel).get_services()
        assert set(wanted) <= set(listed), listed

    checks.run("health of the primary", lambda: healthy(client.to_primary))
    checks.run("health of the backup", lambda: healthy(client.to_backup))
    primary = ["BlockService", "VolumeService", "ReplicationService"]
    checks.run(
        "reflection of the primary",
        lambda: services(client.to_primary, "grpc.health.v1.Health", *(f"understudy.v1.{s}" for s in primary)),
    )
    checks.run("reflection of the backup", lambda: services(client.to_backup, "understudy.v1.BackupService"))


def assert_equal(got, want):
    assert got == want, "the bytes differ"


def main(bin_dir):
    checks = pair.Checks()
    with pair.Pair(bin_dir) as running:
        client = Client(running.primary, running.backup)
        standard_services(checks, client)
        promises(checks, client)
        bad_input(checks, client)

        client.create("victim", MIB)
        served = itertools.count(1)

        def serve_a_client():
            """One write and one read of a legitimate client, while the attack lasts."""
            data = next(served).to_bytes(8, "big") * 512
            client.write("victim", 0, data)
            assert_equal(client.read("victim", 0, 4096), data)

        for node in (running.primary, running.backup):
            hostile.attack(checks, node, serve_a_client)
        for node in running.nodes:
            checks.run(f"the {node.role} is still the same process", lambda n=node: assert_equal(n.process.poll(), None))
            checks.run(f"the {node.role} ends with 0 on SIGTERM", lambda n=node: assert_equal(n.terminate(), 0))
    return checks.finish()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
