"""The networks, in PyTorch. Nothing outside this package, the torch backend, the export and the training imports it."""
