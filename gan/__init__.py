"""The library: networks, objectives, regularizers, training. It parses no command line and builds no dataset."""
