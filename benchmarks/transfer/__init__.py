"""The transfer benchmark: do gains come from chosen experts, from averaging, from extra steps, or from anything at all?

    python -m benchmarks.transfer run --suite core --data ../shared/data/text --work runs/transfer
    python -m benchmarks.transfer report --suite core --data ../shared/data/text --work runs/transfer
    python -m benchmarks.transfer audit --suite core --data ../shared/data/text --work runs/transfer

docs/transfer.md explains the arms and holds the figures.
"""
