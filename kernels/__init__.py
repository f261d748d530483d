"""The definition of each op (reference.py), the cases they are tested and timed on, and how weights are packed.

Lives at the top of the repository and is installed as `d3rt.kernels`. Where the repository root is on sys.path (Python
was started there with -c, -m or a prompt), this folder is found as the top-level package `kernels`, the name of a
package of Hugging Face's that transformers looks for. Then it steps aside: for that package, if it is installed, and
else for an empty module, which transformers takes for none.
"""

if __name__ == "kernels":
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    _root = Path(__file__).resolve().parent.parent
    _spec = PathFinder.find_spec(
        "kernels", [folder for folder in sys.path if Path(folder or ".").resolve() != _root]
    )
    if _spec is not None and _spec.loader is not None:
        sys.modules["kernels"] = module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["kernels"])
    else:
        __path__ = []  # so that nothing in this folder is imported twice, under two names
