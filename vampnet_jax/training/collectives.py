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
    r"(?:calls|to_apply|body|condition|called_computations|branch_computations"
    r"|true_computation|false_computation)=(?:\{([^}]*)\}|%?([\w.-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"(\d+)"')
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
    calls: dict[str, list[tuple[str, int]]] = defaultdict(list)
    found: dict[str, list[tuple[str, float, float]]] = defaultdict(list)
    entry, partitions = "", _PARTITIONS.search(hlo)
    n_devices = int(partitions[1]) if partitions else 1
    for name, is_entry, result, operation, rest in _instructions(hlo):
        entry = name if is_entry else entry
        trips = _TRIPS.search(rest)
        for many, one in _CALLED.findall(rest):
            for called in (part.strip().lstrip("%") for part in (many or one).split(",")):
                calls[name].append((called, int(trips[1]) if trips else 1))
        kind = operation.removesuffix("-start")
        if kind in KINDS:
            size, n = _size(result, operation), _group_size(rest, n_devices)
            if kind == "reduce-scatter":
                size *= n  # the result is a device's part; what is reduced is n times as large
            share = 1.0 if kind == "collective-permute" else (n - 1) / n
            found[name].append((kind, size, size * share * (2 if kind == "all-reduce" else 1)))
    times: dict[str, int] = defaultdict(int)
    _count(entry, 1, calls, times)
    totals: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for name, items in found.items():
        for kind, size, sent in items:
            total = totals[kind]
            total[0] += times[name]
            total[1] += times[name] * size
            total[2] += times[name] * sent
    return [
        Collective(kind, int(totals[kind][0]), *totals[kind][1:])
        for kind in KINDS
        if totals[kind][0]
    ]


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
    name: str, factor: int, calls: dict[str, list[tuple[str, int]]], times: dict[str, int]
) -> None:
    times[name] += factor
    for called, trips in calls[name]:
        _count(called, factor * trips, calls, times)


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
