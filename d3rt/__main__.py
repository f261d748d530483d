"""`python -m d3rt`: the same as the command `d3rt`."""

from d3rt.cli import main

if __name__ == "__main__":
    main()
