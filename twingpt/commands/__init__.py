"""The gpt commands: a file each, with its options, the call and what is shown."""
