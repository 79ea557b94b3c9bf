"""The GPU as the engines of a pipeline share it."""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import Any

from latentrt.backends.cuda.api import Cuda, DeviceBuffer, load_cuda
from latentrt.backends.cuda.device_loop import LoopPool
from latentrt.backends.tensorrt.library import LoadedLibrary, make_logger
from latentrt.engines.record import EngineRecord
from latentrt.errors import EngineError

__all__ = ["EngineDevice"]

_log = logging.getLogger("latentrt")


class EngineDevice:
    """A stream, memory for activations and the library's runtime, shared by engines.

    Args:
        library: TensorRT or TensorRT-RTX.
        cuda: cuda.core, or a stand-in; loaded if None.

    Attributes:
        stream: of cuda.core. stream_handle: the same for the library, an integer.
        lock: held while work that belongs together is put on the stream.
        scratch: the activations of whichever engine runs.
        loops: device-resident loops.
        user_managed: the library's allocation strategy in which contexts are lent memory for activations.
        messages: the library's last errors.

    Raises:
        EngineError: the library would execute host code contained in a plan.
    """

    def __init__(self, library: LoadedLibrary, cuda: Cuda | None = None) -> None:
        self.library, self.cuda = library, cuda or load_cuda()
        self.lock = threading.Lock()
        self.stream = self.cuda.make_stream()
        self.stream_handle = int(self.stream.handle)
        self.scratch = DeviceBuffer(self.cuda, self.stream)
        self.loops = LoopPool(self.cuda, self.stream, self.lock)
        self.user_managed = library.module.ExecutionContextAllocationStrategy.USER_MANAGED
        self.messages: deque[str] = deque(maxlen=20)
        self.logger = make_logger(library, self.messages.append, lambda message: _log.debug("%s: %s", library, message))
        self.runtime = library.module.Runtime(self.logger)
        if self.runtime.engine_host_code_allowed:
            raise EngineError(f"{library} allows host code in plans, which latentrt does not run")

    def deserialize(self, plan: bytes, record: EngineRecord) -> Any:
        """Load a plan whose hash was checked; return the library's engine.

        Raises:
            EngineError: the library does not load it; the message has the library's reason.
        """
        self.messages.clear()
        engine = self.runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineError(
                f"{record.identity.component}: {self.library} does not load the engine {record.key[:12]}: "
                f"{self.reason()}. Build it again: latentrt build --force"
            )
        return engine

    def reason(self) -> str:
        """Return the library's last errors."""
        return "; ".join(list(self.messages)[-2:]) or "the library gave no reason"
