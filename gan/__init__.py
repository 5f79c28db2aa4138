"""The library: networks, objectives, regularisers, training. Parses no command line, builds no dataset."""
