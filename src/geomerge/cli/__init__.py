"""The command line. One file a verb, each thin; what is heavy is imported inside the verb that needs it."""
