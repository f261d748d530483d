"""The definition of each op (reference.py), the cases they are tested and timed on, and the Triton kernels."""
