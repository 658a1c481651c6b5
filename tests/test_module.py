"""The layer: what nn.Module and two nn.Conv2d promise."""
