"""`python -m higen` is the command `higen`."""

from higen.cli import main

if __name__ == "__main__":
    main(prog_name="higen")
