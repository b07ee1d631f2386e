"""The compiled kernels run without a GPU: their PTX, executed by NumPy on the tensors of the CPU."""
