"""Keep other libraries' bars and notices off the terminal."""

from __future__ import annotations


def quieten() -> None:
    """Switch off the progress bars and warnings of transformers, the hub client and `datasets`."""
    import datasets
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    disable_progress_bars()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
