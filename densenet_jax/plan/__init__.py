"""What a training step costs on chips that are not there: compiled for them, counted, and bounded by their peaks."""
