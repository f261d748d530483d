"""The definition of each op (reference.py), the cases they are tested and timed on, and the Triton kernels.

Lives at the top of the repository and is installed as `d3rt.kernels`. Under its own folder's name it would
take the place of Hugging Face's package `kernels`, which transformers looks for, so it refuses to be imported
that way.
"""

if __name__ == "kernels":
    raise ImportError(
        "this is d3rt's folder kernels/, found as the top-level package `kernels`: the repository root is on "
        "sys.path (Python was started there with -m, -c or a prompt, or PYTHONPATH names it). Import it as "
        "`d3rt.kernels`, and start Python from another folder, with `python -P`, or by the command `d3rt`."
    )
