"""OFA (One For All, Wang et al., ICML 2022): configuration, model, processor, checkpoints and generation."""
