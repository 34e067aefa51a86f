"""Memory-bound work as Triton kernels, one file each: a function, its kernel, and its twin in plain torch with the same signature.

The function chooses by device (`language.runs`): the kernel for floating-point tensors on CUDA where Triton is installed, the twin
anywhere else, in fp64 and on CPUs. Each kernel is an opaque torch op (`torch.library.custom_op`), so torch.compile traces
through it; what is differentiable is an autograd.Function whose two directions are such ops. `TRITON_INTERPRET=1`, set before the
first import, sends CPU tensors through the kernels, too: so they are tested.

This room knows tensors only: no model, no configuration.
"""
