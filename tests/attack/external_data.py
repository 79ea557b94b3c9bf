"""Graphs that reach for data other than their weights, or ask for more than a component may have.

Each case is a graph of a small denoiser with one thing changed. It lies in a bundle with a correct hash, beside files
that it must not reach: a secret one, a hard link and a symbolic link. Reading it must be a `GraphError`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.digests import file_record
from latentrt.bundle.onnx_graph import MAX_GRAPH_BYTES
from latentrt.errors import GraphError, LatentRTError
from tests.runtime.onnx_writer import (
    Message,
    attribute,
    constant,
    encode,
    external,
    graph,
    model,
    node,
    varint,
)
from tests.runtime.small_bundle import SIGNATURES, edit_manifest, write_bundle

__all__ = ["GRAPH", "cases", "run", "valid"]

_COMPONENT = "unet"
GRAPH, _WEIGHTS = f"{_COMPONENT}/model.onnx", "model.safetensors"
_, _INPUTS, _OUTPUTS = SIGNATURES[_COMPONENT]
_SAMPLE, _RESULT = _INPUTS[0].name, _OUTPUTS[0].name
_FLOAT, _INT64, _STRING = 1, 7, 8
SCALE = external("scale", _FLOAT, [1], location=_WEIGHTS)


def run(data: bytes, folder: Path) -> LatentRTError | None:
    """Put a graph into a bundle in `folder`, and read it in every way that a backend can.

    Raises:
        AssertionError: the attack succeeded: the graph is accepted.
    """
    folder, refusal = folder / "bundle", None
    if not (folder / "bundle.json").exists():
        write_bundle(folder)
        secret = folder.with_name(f"{folder.name}.secret")
        secret.write_bytes(b"secret" * 100)
        (folder / _COMPONENT / "secret").write_bytes(secret.read_bytes())
        os.link(secret, folder / _COMPONENT / "hard-link")
        (folder / _COMPONENT / "link").symlink_to(secret)
    (folder / GRAPH).write_bytes(data)
    pin = file_record(folder / GRAPH)

    def repin(tree: Any) -> None:
        tree["files"][GRAPH] = {"sha256": pin.sha256, "size": pin.size}

    edit_manifest(folder, repin)
    bundle = Bundle.open(folder)
    for read in (bundle.read_graph, bundle.path, lambda name: bundle.read(name, MAX_GRAPH_BYTES)):
        try:
            read(GRAPH)
        except GraphError as error:
            refusal = error
        else:
            raise AssertionError(f"{read.__name__} returned the graph")
    return refusal


def valid() -> Message:
    """The graph that every case is a change of."""
    return _model([SCALE])


def cases() -> Iterator[tuple[str, bytes]]:
    """Yield every case: a name that states the fault, and the bytes of the graph that has it."""
    for name, changed in (*_locations(), *_entries(), *_spans(), *_tensors(), *_places(), *_operators(), *_promises()):
        yield name, encode(changed)
    yield from _encodings()


def _model(
    initializers: Sequence[Message],
    nodes: Sequence[Message] = (),
    *,
    to_graph: Message | None = None,
    to_model: Message | None = None,
) -> Message:
    """A graph that multiplies by `scale`, and what else is given."""
    last = node("Mul", [_SAMPLE, "scale"], [_RESULT])
    content = [*graph([*nodes, last], initializers, _INPUTS, _OUTPUTS), *(to_graph or [])]
    return [*model(content), *(to_model or [])]


def _weight(**changes: Any) -> Message:
    """The weight with another location, offset or length."""
    return external("scale", _FLOAT, [1], **{"location": _WEIGHTS, **changes})


def _locations() -> Iterator[tuple[str, Message]]:
    others = [
        "secret", "hard-link", "link", "../secret", "../unet/model.safetensors", "./model.safetensors",
        "model.safetensors/", "model.safetensors/.", "/etc/passwd", "/proc/self/mem", "//server/share/x",
        "..\\secret", "\\\\server\\share", "C:\\secret", "C:secret", "c:/secret", "file:///etc/passwd",
        "https://example.com/x", "*/_ORT_MEM_ADDR_/*", "*/_ORT_MEM_ADDR_/*/140000000000", "", " ", ".", "..", "~",
        "~/x", "$HOME/x", "model.safetensors ", " model.safetensors", "MODEL.SAFETENSORS", "model.safetensors\n",
        "model.safetensors\0", "model.safetensors\0.png", "\0", "model．safetensors", "model.safetensors:stream",
        "model.onnx", "../vae_decoder/model.safetensors", "unet/model.safetensors", "x" * 5000, "model.safetensors?",
        "%6dodel.safetensors", "model.safetensors#0", "nul", "/dev/stdin", "../bundle.json", "\u202emodel.safetensors",
    ]  # fmt: skip
    for location in others:
        yield f"location {location[:40]!r}", _model([_weight(location=location)])
    for raw in (b"\xff", b"model.safetensors\xff", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf8\x88\x80\x80\x80"):
        yield f"location {raw!r}", _model([_weight(location=raw)])


def _entries() -> Iterator[tuple[str, Message]]:
    own = [("location", _WEIGHTS), ("offset", "0"), ("length", "4")]
    lists: list[tuple[str, list[tuple[str, str]]]] = [
        *((f"without {key}", [each for each in own if each[0] != key]) for key, _ in own),
        *((f"{key} twice", [*own, (key, text)]) for key, text in own),
        *((f"with {key}", [*own, (key, "x")]) for key in ("checksum", "basepath", "Location", "", "prepacked_0", "x")),
        *(
            (f"{key} in capitals", [each if each[0] != key else (key.upper(), each[1]) for each in own])
            for key, _ in own
        ),
        ("a second location", [("location", "secret"), *own]),
        ("a later location", [*own, ("location", "secret")]),
        ("no entries but a location", own[:1]),
        ("offset as a key of a location", [("location", _WEIGHTS), ("offset", "0"), ("location", "secret")]),
    ]
    start = [(1, 1), (2, _FLOAT), (8, "scale"), (14, 1)]
    for name, entries in lists:
        yield f"entries: {name}", _model([[*start, *((13, [(1, key), (2, text)]) for key, text in entries)]])
    fields = [(13, [(1, key), (2, text)]) for key, text in own]
    yield "an entry with two keys", _model([[*start, *fields[:2], (13, [(1, "length"), (1, "length"), (2, "4")])]])
    yield "an entry without a value", _model([[*start, *fields[:2], (13, [(1, "length")])]])


def _spans() -> Iterator[tuple[str, Message]]:
    numbers = (
        "-1",
        "+0",
        "0x0",
        "00",
        "0 ",
        " 0",
        "0.0",
        "1e3",
        "",
        "٠",
        "x",
        "0b1",
        "1_0",
        "9" * 30,
        str(2**63),
        "-0",
    )
    for number in numbers:
        yield f"offset {number[:20]!r}", _model([_weight(offset=number)])
        yield f"length {number[:20]!r}", _model([_weight(length=number)])
    for offset, length in (("0", "0"), ("0", "8"), ("0", "3"), ("1048583", "4"), ("1048580", "4"), ("4294967296", "4")):
        yield f"offset {offset} and length {length}", _model([_weight(offset=offset, length=length)])
    overlaps = [("0", "0"), ("0", "2"), ("8", "5")]
    for first, second in overlaps:
        other = external("other", _FLOAT, [1], location=_WEIGHTS, offset=second)
        yield f"bytes {first} and {second} overlap", _model([_weight(offset=first), other])
    aliases = [external(f"alias.{index}", _FLOAT, [1], location=_WEIGHTS) for index in range(1000)]
    yield "a thousand names of one weight", _model([SCALE, *aliases])
    whole = external("big", _FLOAT, [1 << 18], location=_WEIGHTS, length=str(1 << 20))
    yield "the whole file, twice", _model([SCALE, whole])
    for dims in ([0], [1 << 40], [-1], [1 << 62, 4], [1] * 9, [1 << 32, 1 << 32]):
        yield f"a weight of shape {dims}", _model([external("scale", _FLOAT, dims, location=_WEIGHTS)])


def _tensors() -> Iterator[tuple[str, Message]]:
    raw = (9, struct.pack("<f", 1))
    yield "raw and external data", _model([[*SCALE, raw]])
    yield "raw data at an external location", _model([[*constant("scale", _FLOAT, [1], bytes(4)), (14, 1)]])
    for location in (0, 2, 3, -1):
        changed = [field for field in SCALE if field[0] != 14] + [(14, location)]
        yield f"data_location {location}", _model([changed])
    yield "external data without a location", _model([[field for field in SCALE if field[0] != 14]])
    yield "no data", _model([[(1, 1), (2, _FLOAT), (8, "scale")]])
    for size in (0, 3, 5, 8):
        yield f"{size} bytes of raw data for 4", _model([constant("scale", _FLOAT, [1], bytes(size))])
    typed = {4: b"\0\0\x80?", 5: b"\1", 7: b"\1", 10: bytes(8), 11: b"\1", 6: b"text"}
    for number, content in typed.items():
        yield f"typed data in field {number}", _model([[(1, 1), (2, _FLOAT), (number, content), (8, "scale")]])
        yield f"typed data in field {number} and external", _model([[*SCALE, (number, content)]])
    for dtype in (_STRING, 0, 12, 16, 17, 22, 23, 99, -1):
        yield f"data type {dtype}", _model([external("scale", dtype, [1], location=_WEIGHTS)])
    for dtype, size in ((6, 4), (_INT64, 8), (9, 1), (11, 8)):
        weight = external("scale", dtype, [1], location=_WEIGHTS, length=str(size))
        yield f"a weight of data type {dtype}", _model([weight])
    yield "a segment", _model([[*SCALE, (3, [(1, 0), (2, 1)])]])
    yield "a tensor's metadata", _model([[*SCALE, (16, [(1, "a"), (2, "b")])]])
    yield "two tensors of one name", _model([SCALE, constant("scale", _FLOAT, [1], bytes(4))])
    yield "a tensor without a name", _model([SCALE, constant("", _FLOAT, [1], bytes(4))])
    yield "a tensor named as an input", _model([SCALE, constant(_SAMPLE, _FLOAT, [1], bytes(4))])
    yield "constants of 8 MB", _model([SCALE, constant("big", 2, [8 << 20], bytes(8 << 20))])


def _places() -> Iterator[tuple[str, Message]]:
    """Foreign data at every place where the format allows a tensor or a graph."""
    tensors = {
        "secret": external("t", _FLOAT, [1], location="secret"),
        "memory": external("t", _FLOAT, [1], location="*/_ORT_MEM_ADDR_/*"),
        "weights": external("t", _FLOAT, [1], location=_WEIGHTS, offset="8"),
        "typed": [(1, 1), (2, _FLOAT), (4, b"\0\0\x80?")],
    }
    body: Callable[[Message], Message] = lambda tensor: [(1, node("Identity", ["t"], ["u"])), (2, "g"), (5, tensor)]  # noqa: E731
    for kind, tensor in tensors.items():
        sparse = [(1, tensor), (2, constant("i", _INT64, [1], bytes(8))), (3, 1)]
        attributes: dict[str, Message] = {
            "a tensor": [(1, "value"), (5, tensor), (20, 4)],
            "tensors": [(1, "value"), (10, tensor), (20, 9)],
            "a graph": [(1, "then_branch"), (6, body(tensor)), (20, 5)],
            "graphs": [(1, "body"), (11, body(tensor)), (20, 10)],
            "a sparse tensor": [(1, "sparse_value"), (22, sparse), (20, 11)],
            "sparse tensors": [(1, "sparse_value"), (23, sparse), (20, 12)],
        }
        for name, each in attributes.items():
            for op_type in ("Constant", "Cast"):
                made = [*node(op_type, [], ["made"]), (5, each)]
                yield f"{name} in an attribute of {op_type}: {kind}", _model([SCALE], [made])
        # A node of the exporter's, in which nothing else is wrong.
        side, fill = constant("side", _INT64, [1], struct.pack("<q", 2)), attribute("value", tensor)
        filled = [*node("ConstantOfShape", ["side"], ["made"]), (5, fill)]
        yield f"a tensor that fills a shape: {kind}", _model([SCALE, side], [filled])
        yield f"a sparse initializer: {kind}", _model([SCALE], to_graph=[(15, sparse)])
        function = [(1, "f"), (7, [*node("Constant", [], ["u"]), (5, attributes["a tensor"])]), (10, "local")]
        yield f"a function: {kind}", _model([SCALE], to_model=[(25, function)])
        yield f"training information: {kind}", _model([SCALE], to_model=[(20, [(1, body(tensor))])])
    yield "a quantization annotation", _model([SCALE], to_graph=[(14, [(1, "scale"), (2, [(1, "a"), (2, "b")])])])
    yield "metadata of the model", _model([SCALE], to_model=[(14, [(1, "a"), (2, "b")])])
    yield "a device configuration", _model([SCALE], to_model=[(26, [(1, "a"), (2, 1)])])


def _operators() -> Iterator[tuple[str, Message]]:
    for op_type, domain in (
        ("Constant", ""), ("If", ""), ("Loop", ""), ("Scan", ""), ("NonZero", ""), ("Einsum", ""), ("Tile", ""),
        ("Mul", "ai.onnx.ml"), ("Mul", "com.microsoft"), ("Custom", "evil"), ("MatMulNBits", "com.microsoft"),
        ("EPContext", "com.microsoft"), ("mul", ""), ("", ""), ("Mul ", ""), ("FunctionCall", "local"),
    ):  # fmt: skip
        yield (
            f"the operator {op_type} of {domain!r}",
            _model([SCALE], [node(op_type, [_SAMPLE, "scale"], ["made"], domain=domain)]),
        )
    content = graph([node("Mul", [_SAMPLE, "scale"], [_RESULT])], [SCALE], _INPUTS, _OUTPUTS)
    for opset in (0, 1, 20, 22, -1, 1 << 40):
        yield f"operators of version {opset}", model(content, opset=opset)
    for version in (0, 3, 9, 11, 1 << 40):
        yield f"IR version {version}", model(content, ir_version=version)
    for opsets in (
        [(1, "evil"), (2, 1)],
        [(1, ""), (2, 21)],
        [(1, "ai.onnx"), (2, 21)],
        [(1, "com.microsoft"), (2, 2)],
    ):
        yield f"operator sets with {opsets}", [*model(content), (8, opsets)]
    yield "no graph", [(1, 10), (8, [(1, ""), (2, 21)])]
    yield "a second graph", [*model(content), (7, content)]


def _promises() -> Iterator[tuple[str, Message]]:
    """Graphs of a few bytes that ask for terabytes."""

    def numbers(name: str, *values: int) -> Message:
        return constant(name, _INT64, [len(values)], struct.pack(f"<{len(values)}q", *values))

    def scales(*values: float) -> Message:
        return constant("n", _FLOAT, [len(values)], struct.pack(f"<{len(values)}f", *values))

    huge = numbers("n", 1 << 20, 1 << 20)
    first = constant("one", _INT64, [], struct.pack("<q", 1))
    nothing = constant("nothing", _INT64, [], bytes(8))
    end = constant("end", _INT64, [], struct.pack("<q", 1 << 42))
    fill = [(1, 1), (2, _FLOAT), (9, bytes(4))]
    yield "ConstantOfShape", _model([SCALE, huge], [node("ConstantOfShape", ["n"], ["made"], value=fill)])
    yield "Expand", _model([SCALE, huge], [node("Expand", ["scale", "n"], ["made"])])
    yield "Range", _model([SCALE, first, nothing, end], [node("Range", ["nothing", "end", "one"], ["made"])])
    pads = numbers("n", 0, 0, 0, 0, 0, 0, 1 << 20, 1 << 20)
    yield "Pad", _model([SCALE, pads], [node("Pad", [_SAMPLE, "n"], ["made"], mode="constant")])
    yield "Resize by scales", _model([SCALE, scales(1, 1, 1e4, 1e4)], [node("Resize", [_SAMPLE, "", "n"], ["made"])])
    sides = numbers("n", 1, 4, 1 << 20, 1 << 20)
    yield "Resize to sizes", _model([SCALE, sides], [node("Resize", [_SAMPLE, "", "", "n"], ["made"])])
    yield "Pad of a constant", _model([SCALE, numbers("n", 0, 1 << 42)], [node("Pad", ["scale", "n"], ["made"])])
    doubled, name = list[Message](), _SAMPLE
    for index in range(30):
        doubled.append(node("Concat", [name, name], [f"d{index}"], axis=0))
        name = f"d{index}"
    yield "Concat of itself, 30 times", _model([SCALE], doubled)
    products = [
        node("Reshape", [_SAMPLE, "n"], ["column"]),
        node("Transpose", ["column"], ["row"], perm=[1, 0]),
        node("Mul", ["column", "row"], ["square"]),
        node("Reshape", ["square", "n"], ["columns"]),
        node("Transpose", ["columns"], ["rows"], perm=[1, 0]),
        node("Mul", ["columns", "rows"], ["made"]),
    ]
    yield "products that are broadcast", _model([SCALE, numbers("n", -1, 1)], products)
    multiply = [
        node("MatMul", ["column", "row"], ["square"]),
        *products[3:5],
        node("MatMul", ["columns", "rows"], ["made"]),
    ]
    yield "products of matrices", _model([SCALE, numbers("n", -1, 1)], [*products[:2], *multiply])
    calculated = [
        node("Shape", [_SAMPLE], ["shape"]),
        node("Mul", ["shape", "shape"], ["squared"]),
        node("Mul", ["squared", "squared"], ["fourth"]),
        node("Expand", [_SAMPLE, "fourth"], ["made"]),
    ]
    yield "a size that is calculated", _model([SCALE], calculated)
    grown = [
        node("Shape", [_SAMPLE], ["shape"]),
        node("Mul", ["shape", "n"], ["larger"]),
        node("ConstantOfShape", ["larger"], ["made"], value=fill),
    ]
    yield "a shape times a number", _model([SCALE, numbers("n", 1 << 10)], grown)
    content = [node("Cast", [_SAMPLE], ["whole"], to=_INT64), node("ConstantOfShape", ["whole"], ["made"], value=fill)]
    yield "a size from the contents of an input", _model([SCALE], content)
    padded = node("Conv", [_SAMPLE, "kernel"], ["made"], pads=[1 << 20] * 4, kernel_shape=[1, 1], strides=[1, 1])
    kernel = external("kernel", _FLOAT, [4, 4, 1, 1], location=_WEIGHTS, offset="16", length="64")
    yield "the pads of a convolution", _model([SCALE, kernel], [padded])
    apart = node("ConvTranspose", [_SAMPLE, "kernel"], ["made"], strides=[1 << 16] * 2, kernel_shape=[1, 1])
    yield "the strides of a transposed convolution", _model([SCALE, kernel], [apart])
    declared = [(1, "made"), (2, [(1, [(1, _FLOAT), (2, [(1, [(1, 1 << 40)])])])])]
    made = node("Mul", [_SAMPLE, "scale"], ["made"])
    yield "a declared shape that is not made", _model([SCALE], [made], to_graph=[(13, declared)])
    negative = [(1, "made"), (2, [(1, [(1, _FLOAT), (2, [(1, [(1, -5)])])])])]
    yield "a declared size below 0", _model([SCALE], [made], to_graph=[(13, negative)])
    for what, changed in (
        ("an unknown input", node("Mul", [_SAMPLE, "unknown"], ["made"])),
        ("a later output", node("Mul", [_SAMPLE, _RESULT], ["made"])),
        ("a name made twice", node("Mul", [_SAMPLE, "scale"], [_RESULT])),
        ("a name of an input", node("Mul", [_SAMPLE, "scale"], [_SAMPLE])),
        ("an attribute twice", [*node("Cast", [_SAMPLE], ["made"], to=1), (5, attribute("to", 7))]),
        ("an attribute of two values", [*node("Cast", [_SAMPLE], ["made"]), (5, [*attribute("to", 1), (4, "x")])]),
    ):
        yield f"a node with {what}", _model([SCALE], [changed])


def _encodings() -> Iterator[tuple[str, bytes]]:
    data = encode(valid())
    for size in (0, 1, 2, len(data) // 2, len(data) - 1):
        yield f"the first {size} bytes", data[:size]
    yield "a byte more", data + b"\0"
    yield "an unknown field", data + varint(99 << 3) + b"\1"
    yield "the field 0", data + b"\0\1"
    yield "a group", data + varint(9 << 3 | 3) + varint(9 << 3 | 4)
    yield "the end of a group", data + varint(9 << 3 | 4)
    yield "a field of 64 bits", data + varint(9 << 3 | 1) + bytes(8)
    yield "a second IR version", data + b"\x08\x0a"
    yield "a long form of a number", b"\x08\x8a\x00" + data[2:]
    yield "a number without an end", b"\x08" + b"\xff" * 20 + data[2:]
    yield "a length beyond the file", data + varint(2 << 3 | 2) + varint(1 << 40)
    yield "packed dimensions", encode(_model([[(1, b"\1"), *SCALE[1:]]]))
    yield "a million empty inputs", encode(_model([SCALE], [[(1, "")] * 100_000 + node("Mul", [], ["made"])]))
    deep: Message = [(1, "then_branch"), (20, 5)]
    for _ in range(200):
        deep = [(1, "then_branch"), (6, [(1, [(4, "If"), (5, deep)])]), (20, 5)]
    yield "graphs in graphs", encode(_model([SCALE], [[*node("If", [], ["made"]), (5, deep)]]))
    ir = '<?xml version="1.0"?><net name="n" version="11"><layers/></net>'
    yield "an OpenVINO IR", ir.encode()
    yield "an OpenVINO IR with a mark", b"\xef\xbb\xbf" + ir.encode()
    yield "a pickle", b"\x80\x04\x95\x00\x00\x00\x00."
    yield "an archive", b"PK\x03\x04" + bytes(100)
    yield "text", b"no graph at all"
    yield "zeros", bytes(1000)
    yield "an ORT file", b"\x18\x00\x00\x00ORTM" + bytes(100)
