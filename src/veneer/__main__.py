"""`python -m veneer`, which `torchrun -m veneer` needs."""

from veneer.cli.main import process

if __name__ == "__main__":
    process()
