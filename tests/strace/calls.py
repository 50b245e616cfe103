"""Reads what `strace -f -y -T -ttt` wrote, and judges whether acknowledgements came after the syncs they depend on."""

import os
import re
from dataclasses import dataclass

LINE = re.compile(r"^(\d+) +(\d+\.\d+) (.*)$", re.DOTALL)
RESUMED = re.compile(r"^<\.\.\. \w+ resumed>(.*)$", re.DOTALL)
UNFINISHED = " <unfinished ...>"
RESULT = re.compile(r"\) += (-?\d+)(?:<([^>]*)>)?[^<]*(?:<(\d+\.\d+)>)?$")
DESCRIPTOR = re.compile(r"^\w+\(\d+<([^>]*)>")

WRITES = ("pwritev", "pwrite64", "pwritev2", "write", "writev")
SYNCS = ("fdatasync", "fsync")
CREATES = ("openat",)


@dataclass
class Call:
    """A finished system call; times are seconds of the wall clock."""

    name: str
    path: str
    start: float
    end: float
    text: str
    # It really happened and succeeded.
    done: bool


def parse(lines):
    """The finished calls on files, in the order in which they began."""
    calls, unfinished = [], {}
    for line in lines:
        match = LINE.match(line.rstrip("\n"))
        if not match:
            continue
        pid, start, text = match[1], float(match[2]), match[3]
        if text.endswith(UNFINISHED):
            unfinished[pid] = (start, text.removesuffix(UNFINISHED))
            continue
        if resumed := RESUMED.match(text):
            if pid not in unfinished:
                continue
            start, begun = unfinished.pop(pid)
            text = begun + resumed[1]
        result = RESULT.search(text)
        if not result:
            continue
        name = text.partition("(")[0]
        descriptor = DESCRIPTOR.match(text)
        path = result[2] if name in CREATES else descriptor and descriptor[1]
        if path:
            done = int(result[1]) >= 0 and "(INJECTED)" not in text
            calls.append(Call(name, path, start, start + float(result[3] or 0), text, done))
    return sorted(calls, key=lambda call: call.start)


def violations(calls, acks):
    """For each of `acks` (marker in the data, time of the answer) that came before its syncs: why."""
    found = []
    written = [c for c in calls if c.name in WRITES and "/journal/" in c.path and c.done]
    synced = [c for c in calls if c.name in SYNCS and c.done]
    created = {}
    for call in calls:
        if call.name in CREATES and "O_CREAT" in call.text and "/journal/" in call.path and call.done:
            created.setdefault(call.path, call.end)

    def sync_between(path, start, end):
        return any(s.path == path and s.start >= start and s.end <= end for s in synced)

    for marker, answered in acks:
        copies = [w for w in written if marker in w.text]
        if not copies:
            found.append(f"{marker}: was not written to the journal")
        elif not any(sync_between(w.path, w.end, answered) for w in copies):
            found.append(f"{marker}: answered before {copies[0].path} was synced")
        elif not any(
            w.path not in created or sync_between(os.path.dirname(w.path), created[w.path], answered) for w in copies
        ):
            found.append(f"{marker}: answered before the directory of the new file {copies[0].path} was synced")
    return found
