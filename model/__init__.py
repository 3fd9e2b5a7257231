"""The network and what it is initialized from: layers, configuration, whitening statistics, kernel backends."""
