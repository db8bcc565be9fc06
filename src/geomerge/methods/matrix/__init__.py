"""Methods whose output is a function of whole weight matrices."""
