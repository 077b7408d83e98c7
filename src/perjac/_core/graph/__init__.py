"""The TensorFlow graph: trace → program → normal form → sites, and what it proves of examples."""
