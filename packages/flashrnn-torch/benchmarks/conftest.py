"""Lets pytest, which collects doctests everywhere, leave the scripts here alone: they need a GPU and each other."""

collect_ignore_glob = ["*.py"]
