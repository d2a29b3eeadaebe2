"""Reads the text of a program that XLA compiled for a TPU: its cycles and its collectives.

The text is a list of computations, each a list of instructions `%name = type opcode(...), ...`.
The compiler notes the cycles that it expects for most of them ("estimated_cycles"). The body of a
loop appears once; the number of iterations is the constant in the loop's condition. The TPU
compiler notes no cycles for collectives, so their bytes are counted. Its reduce-scatters are
fusions of an all-reduce and a slice.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

SCOPES = ("attention", "update")  # `jax.named_scope`s of a training step
COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
BITS = {"pred": 8, "bf16": 16}  # of types whose name does not start with letters and bits
HEADER = re.compile(r"^(ENTRY )?%?(\S+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(\S+) = (.*)$")
ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
CALLED = re.compile(
    r"\b(?:calls|to_apply|true_computation|false_computation)=%?([^\s,})]+)"
    r"|\bbranch_computations=\{([^}]*)\}"
)


class Instruction(NamedTuple):
    """type: of the result, as text. rest: the text after the opcode's opening bracket."""

    type: str
    opcode: str
    rest: str


class Collective(NamedTuple):
    """A collective of the program, which runs `count` times a step.

    num_bytes: of the result on one device, each time. group: how many devices take part. channel:
    its number; a collective that overlaps several fusions appears in each of them.
    """

    kind: str
    num_bytes: int
    group: int
    count: int
    channel: str | None = None

    @property
    def wire_bytes(self):
        """Bytes that a device sends each time in a ring (Thakur et al. 2005)."""
        share = (self.group - 1) / self.group
        factors = {
            "all-reduce": 2 * share,  # a reduce-scatter and an all-gather
            "reduce-scatter": self.group - 1,  # the result is one share
            "collective-permute": 1,
            "collective-broadcast": 1,
        }
        return self.num_bytes * factors.get(self.kind, share)


class Program(NamedTuple):
    """cycles: the compiler's estimate for one run on one device, by `_kind`; no collectives."""

    cycles: Counter
    collectives: list


def read(text):
    """The Program of a compiled module's text; ValueError if the text cannot be parsed."""
    computations, entry = parse(text)
    collectives = []
    cycles = _walk(computations, entry, 1, True, collectives)
    once = {(each.channel or index, each.count): each for index, each in enumerate(collectives)}
    return Program(cycles, list(once.values()))


def parse(text):
    """({computation: {name: Instruction}}, the name of the entry computation)."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        header = HEADER.match(line)
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        found = INSTRUCTION.match(line)
        if found and current is not None:
            current[found[1]] = _instruction(found[2])
    if entry is None:
        raise ValueError(f"text must be a compiled module with an ENTRY, got {text[:100]!r}")
    return computations, entry


def _instruction(text):
    end = _closing(text) if text.startswith("(") else text.find(" ")
    opcode, _, rest = text[end:].strip().partition("(")
    return Instruction(text[:end], opcode, rest)


def _closing(text):
    """The index after the bracket that closes the first one."""
    depth = 0
    for index, letter in enumerate(text, start=1):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return index
    raise ValueError(f"a tuple must be closed, got {text[:100]!r}")


def _walk(computations, name, times, timed, collectives):
    """Cycles by `_kind` of a computation that runs `times` times, as a Counter.

    Appends its collectives to the list. timed: count the cycles of its instructions; inside a
    fusion only the fusion's own count.
    """
    cycles = Counter()
    for instruction in computations[name].values():
        opcode, rest = instruction.opcode, instruction.rest
        kind = opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            num_bytes = size(_result(instruction))
            collectives.append(Collective(kind, num_bytes, group_size(rest), times, _channel(rest)))
            continue
        noted = re.search(r'"estimated_cycles":"(\d+)"', rest)
        if noted and timed:
            cycles[_kind(computations, instruction)] += int(noted[1]) * times
        if opcode == "while":
            body = re.search(r"\bbody=%?([^\s,})]+)", rest)[1]
            condition = re.search(r"\bcondition=%?([^\s,})]+)", rest)[1]
            iterations = times * trip_count(computations[condition])
            cycles += _walk(computations, body, iterations, timed, collectives)
            continue
        if opcode in ("async-update", "async-done"):  # counted at its async-start
            continue
        if opcode == "conditional":
            cycles += _walk_longest(computations, _called(rest), times, timed, collectives)
            continue
        inner = timed and opcode in ("call", "async-start")
        for callee in _called(rest):
            if callee.startswith("all-reduce-scatter"):
                summed = [x for x in computations[callee].values() if x.opcode == "all-reduce"]
                group, channel = group_size(summed[0].rest), _channel(summed[0].rest)
                num_bytes = size(instruction.type)
                collectives.append(Collective("reduce-scatter", num_bytes, group, times, channel))
                continue
            cycles += _walk(computations, callee, times, inner, collectives)
    return cycles


def _walk_longest(computations, names, times, timed, collectives):
    """As `_walk`, of the branch of a conditional that takes the most cycles."""
    walked = []
    for name in names:
        found = []
        walked.append((_walk(computations, name, times, timed, found), found))
    cycles, found = max(walked, key=lambda each: each[0].total())
    collectives += found
    return cycles


def _kind(computations, instruction):
    """The one of SCOPES that an instruction is in; else products of matrices, or other."""
    name = re.search(r'\bop_name="([^"]*)"', instruction.rest)
    scope = name and re.search(rf"\b({'|'.join(SCOPES)})\b", name[1])
    if scope:
        return scope[1]
    return "products" if _multiplies(computations, instruction) else "other"


def _multiplies(computations, instruction):
    """Whether an instruction, or what it calls, multiplies matrices; a TPU does by convolution."""
    inner = (each for name in _called(instruction.rest) for each in computations[name].values())
    is_product = instruction.opcode in ("convolution", "dot")
    return is_product or any(_multiplies(computations, each) for each in inner)


def _channel(rest):
    found = re.search(r"channel_id=(\d+)", rest)
    return found and found[1]


def _called(rest):
    """The computations that an instruction calls; all branches of a conditional."""
    for one, branches in CALLED.findall(rest):
        yield from [one] if one else [name.strip(" %") for name in branches.split(",")]


def _result(instruction):
    """The type of a collective's result; the tuple of a "-start" also has its operands."""
    name = instruction.opcode
    if name.endswith("-start") and not name.startswith("all-reduce"):
        return _members(instruction.type)[1]
    return instruction.type


def _members(type):
    """The types in a tuple: "(f32[2], (s32[], s32[]))" -> ["f32[2]", "(s32[], s32[])"]."""
    depth, members = 0, [""]
    for letter in type[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            members.append("")
        else:
            members[-1] += letter
    return [member.strip() for member in members]


def size(type):
    """Bytes of an array, or of all arrays of a tuple, from its type, such as f32[2,3]{1,0}."""
    return sum(
        _bits(name) * math.prod(int(extent) for extent in shape.split(",") if extent) // 8
        for name, shape in ARRAY.findall(type)
    )


def _bits(name):
    digits = re.match(r"[a-z]+(\d+)", name)
    return BITS.get(name) or (int(digits[1]) if digits else 0)


def trip_count(condition):
    """The iterations of a loop whose condition compares a counter from 0 with one constant."""
    constants = [
        int(found[1])
        for instruction in condition.values()
        if instruction.opcode == "constant"
        and instruction.type.startswith(("s32[]", "u32[]"))
        and (found := re.match(r"(-?\d+)\)", instruction.rest))
    ]
    if len(constants) != 1:
        raise ValueError(f"a loop's condition must have one constant, got {constants}")
    return constants[0]


def group_size(rest):
    """How many devices take part in a collective, from its attributes as text.

    Groups are lists, {{0,1},{2,3}}; or counts, [2,4]<=[8]; or axes of a mesh,
    mesh['a'=2,'b'=4] {'b'}, where 'b':(2)2 is a part of an axis, of size 2 after a part of size 2.
    """
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest)
    if mesh:
        sizes = {name: int(extent) for name, extent in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest)
    if counted:
        return int(counted[1])
    written = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]*)\}", rest)
    if written:
        return written[1].count(",") + 1
    raise ValueError(f"a collective must name its groups, got {rest[:200]!r}")
