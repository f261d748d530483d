"""A PTX interpreter: runs what Triton really emits, on the CPU, and holds each access against the machine's rules.

program.py reads the text; decoding.py makes of it what can be executed, out of arithmetic.py, loads.py, warps.py
(with matrices.py) and operands.py; machine.py runs that, all threads of some blocks at a time in numpy. memory.py knows
which bytes exist, ordering.py which accesses are ordered by barriers and atomics, traffic.py counts sectors, device.py
runs the launches of d3rt.kernels.cuda. errors.py lists what is caught.

    Machine(parse(ptx), Memory({"x": x, "w": w}), [x.data_ptr(), w.data_ptr(), 0, 0], grid, shared).run()

is all that a launch needs; what the kernel may touch is what Memory was given.

Its limits: PTX, not the machine code that ptxas makes of it. Approximate instructions (ex2, rsqrt, div.full) are exact.
Threads run in lockstep, so a race shows because it is looked for, not because a value comes out wrong.
"""
