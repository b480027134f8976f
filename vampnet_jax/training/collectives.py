"""What devices send each other in a compiled program, read from its text (HLO)."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "s4": 4, "u4": 4}
_BITS |= {f"{sign}{bits}": bits for sign in "su" for bits in (8, 16, 32, 64)}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\((.*)$")
_CALLED = re.compile(
    r"(calls|to_apply|body|condition|called_computations|branch_computations"
    r"|true_computation|false_computation)=(?:\{([^}]*)\}|%?([\w.-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"(\d+)"')
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_GROUPS = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}")
_AXIS = re.compile(r"'(\w+)'(?:=(\d+)|:\(\d+\)(\d+))?")
_PARTITIONS = re.compile(r"num_partitions=(\d+)")


class Collective(NamedTuple):
    """All collectives of one kind in one run of a program, as one device sees them."""

    kind: str
    calls: int
    """How often it is called, loops included."""
    bytes: float
    """Size of what is gathered, reduced or moved, summed over the calls."""
    sent: float
    """What a device sends in a ring: (n − 1)/n of it among n devices, twice for all-reduce."""


def collectives(hlo: str) -> list[Collective]:
    """Count the collectives of a compiled program.

    What a loop calls counts as often as the loop is known to run, once if that is not known.

    Args:
      hlo: `compiled.as_text()` of a partitioned program.
    """
    partitions = _PARTITIONS.search(hlo)
    n_devices = int(partitions[1]) if partitions else 1
    calls: dict[str, list[tuple[str, str]]] = defaultdict(list)
    limits: dict[str, int] = defaultdict(int)  # the largest integer in a loop's condition
    found: list[tuple[str, str, str, float, float]] = []
    entry = ""
    for name, is_entry, result, operation, rest in _instructions(hlo):
        entry = name if is_entry else entry
        for attribute, many, one in _CALLED.findall(rest):
            trips = _TRIPS.search(rest)
            condition = _CONDITION.search(rest)
            times = trips[1] if trips else condition[1] if condition else "1"
            for called in (part.strip().lstrip("%") for part in (many or one).split(",")):
                calls[name].append((called, times if attribute == "body" else "1"))
        if operation == "constant" and result.startswith("s32[]"):
            limits[name] = max(limits[name], int(rest.partition(")")[0]))
        kind = operation.removesuffix("-start")
        if kind in KINDS:
            size, n = _size(result, operation), _group_size(rest, n_devices)
            if kind == "reduce-scatter":
                size *= n  # the result is a device's part; what is reduced is n times as large
            share = 1.0 if kind == "collective-permute" else (n - 1) / n
            channel = _CHANNEL.search(rest)
            key = channel[1] if channel else f"unnumbered {len(found)}"
            sent = size * share * (2 if kind == "all-reduce" else 1)
            found.append((name, kind, key, size, sent))
    times_of: dict[str, int] = defaultdict(int)
    _count(entry, 1, calls, limits, times_of)
    # A collective that overlaps with computing is written in pieces, all with its number.
    channels: dict[str, tuple[str, int, float, float]] = {}
    for name, kind, key, size, sent in found:
        if times_of[name] > channels.get(key, ("", 0))[1]:
            channels[key] = (kind, times_of[name], size, sent)
    result_of = []
    for kind in KINDS:
        same = [item for item in channels.values() if item[0] == kind]
        if same:
            totals = [sum(times * amounts[n] for _, times, *amounts in same) for n in range(2)]
            result_of.append(Collective(kind, sum(item[1] for item in same), *totals))
    return result_of


def _instructions(hlo: str) -> Iterator[tuple[str, bool, str, str, str]]:
    """(computation, whether it is the entry, type of the result, operation, the rest)."""
    name, is_entry = "", False
    for line in hlo.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            name, is_entry = header[1], line.startswith("ENTRY")
            continue
        parts = _INSTRUCTION.match(line)
        if parts:
            yield name, is_entry, parts[1], parts[2], parts[3]


def _count(
    name: str,
    factor: int,
    calls: dict[str, list[tuple[str, str]]],
    limits: dict[str, int],
    times_of: dict[str, int],
) -> None:
    times_of[name] += factor
    for called, times in calls[name]:
        # Of a loop without a known length, the condition's limit is taken: ours count from 0.
        trips = int(times) if times.isdecimal() else max(limits[times], 1)
        _count(called, factor * trips, calls, limits, times_of)


def _size(result: str, operation: str) -> float:
    """Bytes of a result; of an asynchronous start, whose result holds operand and result, half."""
    sizes = [
        math.prod(int(n) for n in shape.split(",") if n) * _BITS.get(dtype, 0) / 8
        for dtype, shape in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", result))
    ]
    if operation == "collective-permute-start":
        return sizes[0]
    if operation == "all-gather-start":
        return sum(sizes[len(sizes) // 2 :])
    return sum(sizes)


def _group_size(rest: str, n_devices: int) -> int:
    groups, listed, mesh = _GROUPS.search(rest), _LISTED.search(rest), _MESH.search(rest)
    if groups:
        return int(groups[2])
    if mesh:  # named axes, of which one may be taken in part: 'a':(start)size
        sizes = {name: int(size) for name, size, _ in _AXIS.findall(mesh[1])}
        return math.prod(int(part or sizes[name]) for name, _, part in _AXIS.findall(mesh[2]))
    return len(listed[1].split(",")) if listed else n_devices  # no groups: all take part
