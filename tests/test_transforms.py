"""torch.compile, torch.export, torch.func and the operator's registration."""
