"""A tensor in a safetensors file, read when it is needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentrt.bundle.digests import open_regular
from latentrt.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["StoredTensor"]

# torch's names of the dtypes of a safetensors header.
_TORCH_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """The place of a tensor in a file.

    Attributes:
        file: the safetensors file, whose header was checked.
        dtype: its dtype, by the name in the header.
        shape: its shape.
        start, end: its bytes in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def load(self) -> Tensor:
        """Read the tensor; numbers of any floating type become float32.

        The bytes are read, not mapped, so that they leave the process's memory with the tensor.

        Raises:
            CheckpointError: the file cannot be read, has become shorter, or the dtype is none of torch's.
        """
        import torch  # finding weights needs none

        dtype: Any = getattr(torch, _TORCH_DTYPES.get(self.dtype, ""), None)
        if dtype is None:
            raise CheckpointError(
                f"{self.file}: got a tensor of {self.dtype}, expected one of {', '.join(_TORCH_DTYPES)}"
            )
        buffer = torch.empty(self.end - self.start, dtype=torch.uint8)
        try:
            with open_regular(self.file) as stream:
                stream.seek(self.start)
                count = stream.readinto(buffer.numpy().data) if buffer.numel() else 0
        except OSError as error:
            raise CheckpointError(f"{self.file} cannot be read: {error.strerror}") from error
        if count != buffer.numel():
            raise CheckpointError(f"{self.file} became shorter while it was read; export it again when it is complete")
        tensor = buffer.view(dtype).reshape(self.shape)
        return tensor.float() if tensor.is_floating_point() else tensor
