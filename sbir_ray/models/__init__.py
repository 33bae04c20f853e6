"""The networks: backbone, retrieval network F, generator G and pair discriminator D."""
