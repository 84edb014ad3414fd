"""Settings and the topology sheet; knows nothing of the other packages."""
