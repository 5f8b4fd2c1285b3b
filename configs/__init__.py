"""Built-in configs: one file per family, one per kind of sweep. `--config=NAME:ARG` finds them from anywhere."""
