"""Image datasets: sources, preparation, the LMDB store, reading, order. Knows no network and imports no torch."""
