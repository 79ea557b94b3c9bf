"""What do the engines of a pipeline share on the GPU?"""

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
    """What the engines of a pipeline share.

    Args:
        library: TensorRT or TensorRT-RTX.
        cuda: the bindings, or what a test puts in their place.

    Attributes:
        lock: held while something is put on the stream that has to stay together.
        scratch: the activations of whichever engine runs.
        loops: denoising loops whose latents stay on the device.
        user_managed: how contexts get their memory for activations: they are lent it.
    """

    def __init__(self, library: LoadedLibrary, cuda: Cuda | None = None) -> None:
        self.library, self.cuda = library, cuda or load_cuda()
        self.lock = threading.Lock()
        self.stream = self.cuda.make_stream()
        self.scratch = DeviceBuffer(self.cuda)
        self.loops = LoopPool(self)
        self.user_managed = library.module.ExecutionContextAllocationStrategy.USER_MANAGED
        self.said: deque[str] = deque(maxlen=20)
        self.logger = make_logger(library, self.said.append, lambda message: _log.debug("%s: %s", library, message))
        self.runtime = library.module.Runtime(self.logger)
        if self.runtime.engine_host_code_allowed:
            raise EngineError(f"{library} would run host code out of a plan; latentrt does not")

    def deserialize(self, plan: bytes, record: EngineRecord) -> Any:
        """A plan whose hash was checked → the library's engine.

        Raises:
            EngineError: with what the library says of it.
        """
        self.said.clear()
        engine = self.runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise EngineError(
                f"{record.identity.component}: {self.library} does not load the engine {record.key[:12]}: "
                f"{self.words()}. "
                "Build it again: latentrt build --force"
            )
        return engine

    def words(self) -> str:
        """What the library said last."""
        return "; ".join(list(self.said)[-2:]) or "it does not say why"
