"""Network blocks, initialisation, grouped convolutions, weight averages and model files."""
