"""vqrs beside its peers: the same rows, the same settings, the error beside bytes and seconds."""
