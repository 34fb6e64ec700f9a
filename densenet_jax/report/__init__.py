"""The pages that tell what a run has done, for a person: figures, pictures, settings and the way on."""
