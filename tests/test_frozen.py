"""freeze() and unfreeze()."""
