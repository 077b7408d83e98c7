"""TensorFlow, Keras and the machine: private names, compiled calls, XLA, types, shapes, memory."""
