"""The faster step: PyTorch chose the kernels of matrix products."""

ADDED = {"performance.choose_matrix_kernels": False}
