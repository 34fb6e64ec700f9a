"""Plans a training step for chips that are not here: compiles it for them and counts memory, traffic and bounds."""
