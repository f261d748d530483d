"""The ops of a decode step as Triton kernels: device twins of kernels/reference.py, one file per op or family of ops.

plans.py says which launches (launch.py) make an op, tiles.py how large their tiles are, eager.py runs them one by one,
compiled.py makes machine code of them. Everything that a step reads or writes lies in device buffers, positions and
tokens too, so that a recorded launch never needs a new parameter. What is not here: how launches become a CUDA graph,
and who enqueues it.

Activations, biases and norms are float32, as the decoder keeps them. Packed weights are weight-only here: a kernel
widens the codes in registers and multiplies them with float32 activations, where the CPU kernels (and reference.py's
`linear`) quantise the activations to int8 first. So a product with a packed matrix is defined on this device as
x . dequantize(w), which is the more exact of the two.
"""
