"""A stand-in for TensorRT, with its names. A plan names a graph of a bundle, which ONNX Runtime runs, or a function.

It checks what the library would check: shapes within the profile, and addresses and lent memory that are allocated and
large enough. A test compares the names with those of the real library's classes.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from latentrt.backends.onnxruntime import OnnxRuntimeSession, open_session
from latentrt.backends.tensorrt.library import LoadedLibrary
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.tensors import TensorSpec, axis_sizes, sized
from latentrt.bundle.weights import map_weights
from latentrt.engines.record import EngineRecord, LibraryName, ShapeRange
from latentrt_engines.cache import digest_arrays
from tests.runtime.backends.fake_cuda import HANDLE, FakeCudaApi

# Bytes of activations per element of the inputs.
SCRATCH_PER_ELEMENT = 2

# Functions that plans name, from inputs to outputs.
FUNCTIONS: dict[str, Callable[[dict[str, NDArray[Any]]], dict[str, NDArray[Any]]]] = {}


def fake_plan(bundle: Bundle, record: EngineRecord) -> bytes:
    """Return a plan of a bundle's graph, which `FakeRuntime` loads."""
    names = {"bundle": str(bundle.folder), "component": record.identity.component, "precision": "float32"}
    return json.dumps({**names, "profile": _plain_profile(record)}).encode()


def function_plan(function: str, record: EngineRecord) -> bytes:
    """Return a plan of one of `FUNCTIONS`, which `FakeRuntime` loads."""
    specs = {"inputs": record.inputs, "outputs": record.outputs}
    signature = {name: [[spec.name, spec.dtype, spec.shape] for spec in each] for name, each in specs.items()}
    return json.dumps({"function": function, **signature, "profile": _plain_profile(record)}).encode()


def _plain_profile(record: EngineRecord) -> dict[str, Any]:
    return {name: [shapes.min, shapes.opt, shapes.max] for name, shapes in record.identity.profile.items()}


def fake_library(cuda: FakeCudaApi, name: LibraryName = "tensorrt", version: str = "11.1+cu13") -> LoadedLibrary:
    """Return the library, over a fake CUDA."""
    module = FakeModule()
    module.Runtime = lambda logger: FakeRuntime(logger, cuda)
    return LoadedLibrary(name=name, module=module, version=version)


class FakeLogger:
    ERROR, WARNING = 1, 2

    def log(self, severity: int, message: str) -> None: ...


class FakeModule:
    """A stand-in for the module `tensorrt`."""

    ILogger = FakeLogger
    Runtime: Any

    class ExecutionContextAllocationStrategy:
        USER_MANAGED = "user managed"

    class CudaGraphStrategy:
        WHOLE_GRAPH_CAPTURE = "whole graph"

    class SerializationFlag:
        EXCLUDE_WEIGHTS, INCLUDE_REFIT = "exclude weights", "include refit"

    def Weights(self, dtype: FakeDType, address: int, count: int) -> NDArray[Any]:  # noqa: N802, the library's name
        memory = (ctypes.c_char * (count * np.dtype(dtype.numpy).itemsize)).from_address(address)
        weights: NDArray[Any] = np.frombuffer(memoryview(memory), dtype.numpy)
        return weights

    def Refitter(self, engine: FakeEngine, logger: FakeLogger) -> FakeRefitter:  # noqa: N802, the library's name
        return FakeRefitter(engine)


class FakeRuntime:
    engine_host_code_allowed = False

    def __init__(self, logger: FakeLogger, cuda: FakeCudaApi) -> None:
        self.logger, self.cuda = logger, cuda

    def deserialize_cuda_engine(self, plan: bytes) -> FakeEngine | None:
        try:
            return FakeEngine(json.loads(plan), self.cuda)
        except ValueError:
            self.logger.log(1, "Serialization assertion magicTagRead == kMAGIC_TAG failed")
            return None


class FakeRuntimeCache:
    def __init__(self) -> None:
        self.compiled = b""

    def deserialize(self, data: bytes) -> bool:
        self.compiled = data
        return data.startswith(b"kernels")

    def serialize(self) -> bytes:
        return self.compiled or b"kernels"


class FakeRuntimeConfig:
    cuda_graph_strategy = ""

    def __init__(self) -> None:
        self.strategy, self.cache = "", FakeRuntimeCache()

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> FakeRuntimeCache:
        return FakeRuntimeCache()

    def set_runtime_cache(self, cache: FakeRuntimeCache) -> None:
        self.cache = cache


class FakeSerializationConfig:
    def __init__(self) -> None:
        self.flags = {FakeModule.SerializationFlag.EXCLUDE_WEIGHTS}

    def clear_flag(self, flag: str) -> bool:
        self.flags.discard(flag)
        return True

    def set_flag(self, flag: str) -> bool:
        self.flags.add(flag)
        return True


class FakeEngine:
    """Computes with the weights of the bundle that its plan names, and with others once it is refitted."""

    refittable = True
    device_memory_size_v2 = 1 << 20

    def __init__(self, plan: dict[str, Any], cuda: FakeCudaApi) -> None:
        self.cuda, self.plan = cuda, plan
        if "function" in plan:
            self.inputs, self.outputs = (
                tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in plan[each])
                for each in ("inputs", "outputs")
            )
            self.compute, self.weights = FUNCTIONS[plan["function"]], dict[str, Any]()
        else:
            self.bundle = Bundle.open(Path(plan["bundle"]))
            self.component = self.bundle.manifest.components[plan["component"]]
            self.inputs, self.outputs = self.component.inputs, self.component.outputs
            self.compute = open_session(self.bundle, plan["component"], threads=1).run
            self.weights = map_weights(self.bundle.folder / self.component.weights.file)
        self.profile = {
            name: ShapeRange(min=tuple(low), opt=tuple(best), max=tuple(high))
            for name, (low, best, high) in plan["profile"].items()
        }

    def create_serialization_config(self) -> FakeSerializationConfig:
        return FakeSerializationConfig()

    def serialize_with_config(self, config: FakeSerializationConfig) -> bytes:
        assert config.flags == {FakeModule.SerializationFlag.INCLUDE_REFIT}
        return json.dumps({**self.plan, "refitted": digest_arrays(self.weights)}).encode()

    def create_runtime_config(self) -> FakeRuntimeConfig:
        return FakeRuntimeConfig()

    def create_execution_context(self, how: Any) -> FakeContext:
        strategy = how.strategy if isinstance(how, FakeRuntimeConfig) else how
        assert strategy == FakeModule.ExecutionContextAllocationStrategy.USER_MANAGED
        return FakeContext(self)


@dataclass(frozen=True)
class FakeDType:
    name: str
    numpy: str


@dataclass(frozen=True)
class FakePrototype:
    dtype: FakeDType
    size: int


_FAKE_DTYPES = {"float16": FakeDType("HALF", "float16"), "float32": FakeDType("FLOAT", "float32")}


class FakeRefitter:
    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine
        self._new: dict[str, NDArray[Any]] = {}

    def get_all_weights(self) -> list[str]:
        return list(self._engine.weights)

    def get_weights_prototype(self, name: str) -> FakePrototype:
        array = self._engine.weights[name]
        return FakePrototype(_FAKE_DTYPES[array.dtype.name], array.size)

    def set_named_weights(self, name: str, weights: NDArray[Any]) -> bool:
        self._new[name] = weights
        return True

    def get_missing_weights(self) -> list[str]:
        return [name for name in self._engine.weights if name not in self._new]

    def refit_cuda_engine(self) -> bool:
        assert not self._engine.cuda.queue, "the engine is running"
        former = self._engine.weights
        self._engine.weights = {name: array.reshape(former[name].shape).copy() for name, array in self._new.items()}
        self._engine.compute = session_with(self._engine).run
        return True


def session_with(engine: FakeEngine) -> OnnxRuntimeSession:
    """Open the engine's graph with the weights that the engine holds now."""
    names = engine.component.graphs["float32"].file
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in engine.weights.values()]
    options.add_external_initializers(list(engine.weights), values)
    graph = engine.bundle.read_graph(names)
    session = onnxruntime.InferenceSession(graph.data, options, providers=["CPUExecutionProvider"])
    return OnnxRuntimeSession(session, graph, engine.component.inputs, engine.component.outputs, values)


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.cuda = engine, engine.cuda
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.lent = (0, 0)
        self.runs = 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if not self.engine.profile[name].covers(shape):
            return False
        self.shapes[name] = shape
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        return SCRATCH_PER_ELEMENT * sum(int(np.prod(shape)) for shape in self.shapes.values())

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.update_device_memory_size_for_shapes()
        self.cuda.check_range(address, size)
        self.lent = (address, size)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.shapes:
            return self.shapes[name]
        spec = next(spec for spec in self.engine.outputs if spec.name == name)
        return sized(spec, axis_sizes(self.engine.inputs, self.shapes))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        specs = (*self.engine.inputs, *self.engine.outputs)
        assert (type(stream), stream) == (int, HANDLE)
        assert self.addresses.keys() == {spec.name for spec in specs}
        assert self.lent[0], "no memory was lent"
        assert self.runs or self.cuda.capturing is None, "the first run sets things up, and cannot be recorded"
        self.runs += 1
        shapes, addresses, lent = dict(self.shapes), dict(self.addresses), self.lent
        outputs = {spec.name: self.get_tensor_shape(spec.name) for spec in self.engine.outputs}

        def work() -> None:
            self.cuda.check_range(*lent)
            feeds = {spec.name: self._at(spec, addresses, shapes[spec.name]) for spec in self.engine.inputs}
            results = self.engine.compute({name: array.copy() for name, array in feeds.items()})
            for spec in self.engine.outputs:
                self._at(spec, addresses, outputs[spec.name])[...] = results[spec.name]

        self.cuda.enqueue(work)
        return True

    def _at(self, spec: TensorSpec, addresses: dict[str, int], shape: tuple[int, ...]) -> NDArray[Any]:
        """Return a view of a tensor in device memory."""
        dtype = np.dtype(spec.dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        self.cuda.check_range(addresses[spec.name], size)
        memory = (ctypes.c_char * size).from_address(addresses[spec.name])
        tensor: NDArray[Any] = np.frombuffer(memoryview(memory), dtype).reshape(shape)
        return tensor
