"""Methods whose output is a linear combination of the inputs."""
