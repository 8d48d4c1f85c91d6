"""Matrix products by a kernel of cuBLASLt that was chosen by measuring, not by its heuristic.

For a shape cuBLASLt names up to eight kernels in the order in which it expects them to be fast; PyTorch takes the
first. On an H100 another one is faster by 2 to 10% for many shapes of a language model (docs/benchmarks-gpu.md).
PyTorch has no way to ask for it, so the library that PyTorch loaded is called here through its C interface (NVIDIA,
cuBLAS 12 and 13, "cublasLtMatmul").
"""

import ctypes
from ctypes import POINTER, byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

_CANDIDATES = 8
_WORKSPACE_BYTES = 0  # kernels that need none: a workspace could not be shared by streams
_ALIGNMENT = 16  # bytes; what the tensor memory accelerator asks for
_COMPUTE_FLOAT32 = 68
_TYPES = {torch.float32: 0, torch.bfloat16: 14}
_TRANSPOSE_A, _TRANSPOSE_B = 3, 4
_MAX_WORKSPACE, _MIN_ALIGNMENTS = 1, (5, 6, 7, 8)


class _Candidate(ctypes.Structure):
    """``cublasLtMatmulHeuristicResult_t``"""

    _fields_ = (
        ("algorithm", c_uint64 * 8),
        ("workspace_bytes", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


@cache
def _library() -> Any:
    """The cuBLASLt that PyTorch uses, with the types of the functions that are called.

    Raises:
        OSError: it is not loaded: PyTorch was built without CUDA, or links it statically.
    """
    if torch.version.cuda is None:
        raise OSError("this PyTorch was built without CUDA")
    library = ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")
    signatures: dict[str, list] = {
        "cublasLtCreate": [POINTER(c_void_p)],
        "cublasLtMatmulDescCreate": [POINTER(c_void_p), c_int, c_int],
        "cublasLtMatmulDescSetAttribute": [c_void_p, c_int, c_void_p, c_size_t],
        "cublasLtMatrixLayoutCreate": [POINTER(c_void_p), c_int, c_uint64, c_uint64, c_int64],
        "cublasLtMatmulPreferenceCreate": [POINTER(c_void_p)],
        "cublasLtMatmulPreferenceSetAttribute": [c_void_p, c_int, c_void_p, c_size_t],
        "cublasLtMatmulAlgoGetHeuristic": [c_void_p] * 7 + [c_int, POINTER(_Candidate), POINTER(c_int)],
        "cublasLtMatmul": [c_void_p] * 14 + [c_size_t, c_void_p],
    }
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_int
    return library


def _call(name: str, *arguments: Any) -> None:
    status = getattr(_library(), name)(*arguments)
    if status:
        raise RuntimeError(f"{name} of cuBLASLt returned status {status}")


@cache
def _handle(_device: torch.device) -> c_void_p:
    """cuBLASLt's handle, which belongs to the current device."""
    handle = c_void_p()
    _call("cublasLtCreate", byref(handle))
    return handle


@dataclass(frozen=True)
class ProductShape:
    """``left @ right`` -> [rows, columns], both contiguous, each given as it is or as the transpose of what is given.

    ``inner`` is the length of the sums. With ``accumulate`` the product is added to the output, which is float32 then;
    inputs are bfloat16, and so is the output else.
    """

    rows: int
    inner: int
    columns: int
    left_transposed: bool = False
    right_transposed: bool = False
    accumulate: bool = False

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.inner * self.columns

    @property
    def out_dtype(self) -> torch.dtype:
        """Of the output."""
        return torch.float32 if self.accumulate else torch.bfloat16

    @property
    def left_size(self) -> tuple[int, int]:
        """Of the left matrix as it lies in memory."""
        return (self.inner, self.rows) if self.left_transposed else (self.rows, self.inner)

    @property
    def right_size(self) -> tuple[int, int]:
        """Of the right matrix as it lies in memory."""
        return (self.columns, self.inner) if self.right_transposed else (self.inner, self.columns)


class Product:
    """Products of one shape by any of cuBLASLt's kernels for it."""

    def __init__(self, shape: ProductShape, device: torch.device) -> None:
        self.shape = shape
        self._handle = _handle(device)
        self._operation = c_void_p()
        _call("cublasLtMatmulDescCreate", byref(self._operation), _COMPUTE_FLOAT32, _TYPES[torch.float32])
        # The library counts columns first: it is given the transposes, so the right matrix is its first.
        for attribute, transposed in ((_TRANSPOSE_A, shape.right_transposed), (_TRANSPOSE_B, shape.left_transposed)):
            value = c_int32(transposed)
            _call("cublasLtMatmulDescSetAttribute", self._operation, attribute, byref(value), ctypes.sizeof(value))
        self._first = _layout(shape.right_size, torch.bfloat16)
        self._second = _layout(shape.left_size, torch.bfloat16)
        self._output = _layout((shape.rows, shape.columns), shape.out_dtype)
        self._zero, self._one, self._keep = c_float(0.0), c_float(1.0), c_float(float(shape.accumulate))
        self._candidates = self._find()
        self.chosen = 0

    def _find(self) -> list[_Candidate]:
        preference = c_void_p()
        _call("cublasLtMatmulPreferenceCreate", byref(preference))
        workspace = c_uint64(_WORKSPACE_BYTES)
        _set(preference, _MAX_WORKSPACE, workspace)
        for attribute in _MIN_ALIGNMENTS:
            _set(preference, attribute, c_uint32(_ALIGNMENT))
        results, found = (_Candidate * _CANDIDATES)(), c_int()
        layouts = (self._first, self._second, self._output, self._output)
        _call(
            "cublasLtMatmulAlgoGetHeuristic", self._handle, self._operation, *layouts, preference,
            _CANDIDATES, results, byref(found),
        )  # fmt: skip
        return [result for result in results[: found.value] if result.state == 0]

    def __len__(self) -> int:
        """How many kernels there are."""
        return len(self._candidates)

    def fits(self, *tensors: torch.Tensor) -> bool:
        """Whether these tensors lie in memory as the kernels need it."""
        return all(x.is_contiguous() and x.data_ptr() % _ALIGNMENT == 0 for x in tensors)

    def run(
        self,
        left: torch.Tensor,
        right: torch.Tensor,
        out: torch.Tensor,
        kernel: int | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write the product to ``out``, or add it where the shape says so and not ``overwrite``.

        By the chosen kernel, or by number ``kernel``.

        Raises:
            RuntimeError: the library refused.
        """
        candidate = self._candidates[self.chosen if kernel is None else kernel]
        _call(
            "cublasLtMatmul", self._handle, self._operation,
            byref(self._one), right.data_ptr(), self._first, left.data_ptr(), self._second,
            byref(self._zero if overwrite else self._keep), out.data_ptr(), self._output, out.data_ptr(), self._output,
            byref(candidate.algorithm), None, 0, torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip


def _layout(size: tuple[int, int], dtype: torch.dtype) -> c_void_p:
    layout = c_void_p()
    _call("cublasLtMatrixLayoutCreate", byref(layout), _TYPES[dtype], size[1], size[0], size[1])
    return layout


def _set(preference: c_void_p, attribute: int, value: Any) -> None:
    _call("cublasLtMatmulPreferenceSetAttribute", preference, attribute, byref(value), ctypes.sizeof(value))
