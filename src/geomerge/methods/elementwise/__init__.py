"""Methods whose output elements depend on the same elements of the inputs."""
